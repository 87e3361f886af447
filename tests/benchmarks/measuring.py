"""What the benchmarks share: a command as a process of its own, its wall time and peak memory."""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

PROGRAM = str(Path(sys.executable).with_name("glm-quant"))


def measure(command: list[str], environment: Mapping[str, str] | None = None) -> tuple[float, int]:
    """Return wall seconds and peak resident bytes of a command; its output is dropped.

    Args:
        command: program and arguments.
        environment: variables besides our own.
    """
    begin = time.perf_counter()
    with Path(os.devnull).open("w") as nowhere:
        process = os.posix_spawn(
            command[0],
            command,
            {**os.environ, **(environment or {})},
            file_actions=[(os.POSIX_SPAWN_DUP2, nowhere.fileno(), 1)],
        )
        _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{command[:3]} failed with status {status}")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - begin, usage.ru_maxrss * unit
