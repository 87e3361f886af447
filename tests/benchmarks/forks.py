"""`glm-quant` as a real process, started in milliseconds, and killed where we say.

Starting Python with numba and mlx takes seconds, so one process imports everything, has no thread,
and forks a child for each run. The child runs the real command line; nothing of it is replaced. It
watches itself through an audit hook and through `os.pwrite` and `os.fsync`: each operation on a
file of the run is written down before it happens, and SIGKILL can be had at any of them, for a
write also when half of it is done.

    python -m tests.benchmarks.forks        (speaks JSON lines; used by `Forks`)
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Self

from tests.plain import PLAIN

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# Stage, operation, and at how many of them a child kills itself.
Moment = tuple[str, str, int]


@dataclass(frozen=True)
class Step:
    """One operation on a file, seen before it happened."""

    stage: str
    operation: str
    file: str
    offset: int = 0
    size_bytes: int = 0


@dataclass
class Run:
    """A run of the command line in a child."""

    pid: int
    folder: Path
    _forks: "Forks"
    _status: int | None = field(default=None)

    @property
    def steps(self) -> list[Step]:
        """What it did so far, in order; a line that a kill tore is left out."""
        lines = (self.folder / "steps").read_text().split("\n")[:-1]
        return [Step(*json.loads(line)) for line in lines]

    @property
    def said(self) -> str:
        """What it printed to stderr."""
        return (self.folder / "stderr").read_text(errors="replace")

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Return the exit code, negative for a signal."""
        if self._status is None:
            self._status = int(self._forks.ask({"wait": self.pid})["status"])
        return self._status

    def has_ended(self) -> bool:
        """Whether it has ended by itself or otherwise."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        return state == "Z"


class Forks:
    """The process that forks; a context manager."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Start it with these variables besides our own."""
        quiet = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.forks"],
            env={**os.environ, **quiet, **environment},
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._folders = tempfile.TemporaryDirectory(prefix="forks-")
        self._count = 0

    def __enter__(self) -> Self:
        self.ask({})
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)
        self._folders.cleanup()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the answer."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, arguments: list[str], output: Path, kill_at: Moment | None = None) -> Run:
        """Run the command line in a child.

        Args:
            arguments: after `glm-quant`.
            output: of `convert`; files in it and beside it are watched.
            kill_at: the moment at which the child kills itself.
        """
        self._count += 1
        folder = Path(self._folders.name) / str(self._count)
        folder.mkdir()
        for name in ("steps", "stdout", "stderr"):
            (folder / name).touch()  # a child may be killed before it opens them
        request = {"arguments": arguments, "output": str(output), "folder": str(folder)}
        answer = self.ask({**request, "kill_at": kill_at})
        return Run(answer["pid"], folder, self)


class _Watch:
    """The child's eye on itself."""

    def __init__(self, output: Path, steps: Path, kill_at: Moment | None) -> None:
        self._output = str(output)
        self._root = str(output.with_name(f".{output.name}.glm-quant"))
        self._steps = os.open(steps, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._stage, self._operation, self._left = kill_at or ("", "", 0)
        self._pwrite, self._fsync = os.pwrite, os.fsync

    def begin(self) -> None:
        """Watch from now on."""
        os.pwrite, os.fsync = self._write, self._sync
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | os.PathLike) and flags & _WRITING:
                self._see("open", os.fspath(path))
        elif event == "os.rename":
            self._see("rename", os.fspath(arguments[1]))
        elif event in ("os.remove", "os.mkdir", "os.rmdir", "os.link"):
            self._see(event[3:], os.fspath(arguments[event == "os.link"]))
        elif event == "os.truncate":
            self._see("truncate", _path(arguments[0]))

    def _write(self, file: int, data: Any, offset: int) -> int:
        size = memoryview(data).nbytes
        if self._see("write", _path(file), offset, size):
            self._pwrite(file, memoryview(data).cast("B")[: size // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return self._pwrite(file, data, offset)

    def _sync(self, file: int) -> None:
        self._see("sync", _path(file))
        self._fsync(file)

    def _see(self, operation: str, path: str | bytes, *place: int) -> bool:
        """Write a step down; returns whether a write is to be torn, and kills at all others."""
        path = os.fsdecode(path)
        stage = self._stage_of(operation, path)
        if stage is None:
            return False
        name = os.path.basename(path)  # noqa: PTH119 - inside an audit hook nothing may open files
        os.write(self._steps, (json.dumps([stage, operation, name, *place]) + "\n").encode())
        if (stage, operation) != (self._stage, self._operation):
            return False
        self._left -= 1
        if self._left == 0 and operation != "write":
            os.kill(os.getpid(), signal.SIGKILL)
        return self._left == 0

    def _stage_of(self, operation: str, path: str) -> str | None:
        if path.startswith(self._root + "/"):
            part = path[len(self._root) + 1 :].partition("/")[0]
            names = {"source": "fetch", "partial": "write", "records": "record"}
            return names.get(part, part)
        if path == self._output or path.startswith(self._output + "/"):
            weights = path.endswith(".safetensors") and operation in ("rename", "link")
            return "rename" if weights or path == self._output else "assemble"
        return None


def _path(file: Any) -> str:
    if isinstance(file, int):
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{file}")  # noqa: PTH115 - as in `_see`
        return ""
    return os.fsdecode(file)


def _child(request: dict[str, Any]) -> NoReturn:
    """Become a run of the command line."""
    folder = Path(request["folder"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as a shell would have started it
    sys.argv = ["glm-quant", *request["arguments"]]
    kill_at = request["kill_at"]
    code = 1
    try:
        _Watch(Path(request["output"]), folder / "steps", kill_at and tuple(kill_at)).begin()
        from flows.cli.main import main

        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _warm() -> None:
    """Import and compile what a conversion needs; leaves no thread.

    The conversion that compiles it is made in a process of its own: MLX keeps threads.
    """
    from typer.testing import CliRunner

    from flows.cli.main import app
    from tests.synthetic import small_config, write_checkpoint

    for module in (
        "flows.cli.display",
        "glm_quant.codes.gptq",
        "glm_quant.codes.search",
        "glm_quant.hub.pin",
        "glm_quant.model.glm_moe_dsa",
        "glm_quant.convert",
        "numba",
    ):
        importlib.import_module(module)
    if (child := os.fork()) != 0:
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise SystemExit("warming up failed")
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "source", small_config(2, 4), shard_bytes=1 << 20)
        options = ["--source", f"{folder}/source", "--recipe", PLAIN, "--output", f"{folder}/out"]
        made = CliRunner().invoke(app, ["convert", *options])
        if made.exit_code:
            sys.stderr.write(f"warming up failed: {made.output} {made.stderr}")
    os._exit(made.exit_code)


def main() -> None:
    """Answer requests until standard input ends."""
    sys.stdout.flush()
    _warm()
    deadline = time.monotonic() + 10
    while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < deadline:  # noqa: PTH208
        time.sleep(0.01)
    if len(os.listdir("/proc/self/task")) > 1:  # noqa: PTH208
        raise SystemExit("this process has threads, so it cannot fork safely")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    living: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if "arguments" in request:
            pid = os.fork()
            if pid == 0:
                _child(request)
            living.add(pid)
            answer = {"pid": pid}
        elif "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            living.discard(request["wait"])
            answer = {"status": os.waitstatus_to_exitcode(status)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in living:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
