"""`glm-quant` as a user starts it: in a process of its own, a home of its own, a fresh shell."""

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Self

# What a person who never heard of them has not set; the home is of the test besides.
_UNSET = ("PREFECT_", "GLM_QUANT_", "HF_", "AWS_", "DO_NOT_TRACK")
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


class CommandLine:
    """Starts commands in a home of their own, and at first with no Prefect server."""

    def __init__(self, home: Path) -> None:
        home.mkdir(exist_ok=True)
        self.home = home
        self.prefect_home = home / ".prefect"
        shell = {k: v for k, v in os.environ.items() if not k.startswith(_UNSET)}
        # No server, even if somebody works with one at the default address of this machine.
        self.environment = shell | {"HOME": str(home), "PATH": PATH, "PREFECT_API_URL": ""}

    def with_variables(self, variables: Mapping[str, str]) -> Self:
        """Return the same, with more variables in the environment."""
        copy = type(self)(self.home)
        copy.environment = self.environment | variables
        return copy

    def run(
        self, *arguments: str | Path, expect: int = 0, program: str = "glm-quant"
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end and hold it to an exit code."""
        done = subprocess.run(
            [program, *map(str, arguments)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done

    def start(
        self,
        *arguments: str | Path,
        program: str = "glm-quant",
        output: BinaryIO | int = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Start a command in a process group of its own, to be killed."""
        return subprocess.Popen(
            [program, *map(str, arguments)],
            env=self.environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def in_fresh_shell(home: Path, proxy: str, *words: str) -> tuple[int, str]:
    """Type a command in a terminal that knows HOME and PATH; returns exit code and screen."""
    master, slave = os.openpty()
    environment = {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HTTPS_PROXY": proxy,  # the way to the world, where somebody takes notes
    }
    typed = subprocess.Popen(
        words, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    screen = b""
    with suppress(OSError):  # on Linux the end of a terminal is an error
        while data := os.read(master, 4096):
            screen += data
    os.close(master)
    return typed.wait(), screen.decode(errors="replace")
