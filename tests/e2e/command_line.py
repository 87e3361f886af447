"""`glm-quant` as a user starts it: in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO


class CommandLine:
    """Starts commands with a Prefect database of their own, and at first no server."""

    def __init__(self, prefect_home: Path) -> None:
        self.prefect_home = prefect_home
        self.environment = {
            **os.environ,
            "PREFECT_HOME": str(prefect_home),
            "PREFECT_API_URL": "",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }

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
