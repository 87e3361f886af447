"""A function in a process of its own: its memory goes with it, and its crash is only an error here.

Parity, divergence and evaluation load models of many gigabytes, and a process does not give all of
that back. The child reads its request from a file and leaves its result in another; progress and
log records come as JSON lines on its stdout. It ends with this process (`glm_quant.children`), so a
killed parent leaves no process behind.
"""

import json
import logging
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, get_type_hints

from pydantic import BaseModel, ConfigDict

from glm_quant import errors
from glm_quant.artifact import disk_errors_named, write_atomic
from glm_quant.children import end_child, end_with_parent, note_child
from glm_quant.errors import GlmQuantError
from glm_quant.model.precision import users_environment

Progress = Callable[[int, int], None]
ResultT = TypeVar("ResultT", bound=BaseModel)

_PACKAGE = "glm_quant"
_STDERR_LINES = 12


@dataclass(frozen=True)
class ChildJob(Generic[ResultT]):
    """What runs in a process of its own.

    Attributes:
        function: "module:name" of a function of a request (a pydantic model) and a `Progress`. A
            name rather than the function, so that the parent need not import what it loads.
        result: type of what the function returns.
        purpose: what the process does, for messages: "evaluates the build".
        crash_error: raised when it ends without a result.
        blocked_modules: packages that the child takes for absent.
    """

    function: str
    result: type[ResultT]
    purpose: str
    crash_error: type[GlmQuantError]
    blocked_modules: tuple[str, ...] = ()


class _Failure(BaseModel):
    """An error of this package that ended the child, to be raised again in the parent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    message: str
    may_pass: bool


def run_in_child(
    job: ChildJob[ResultT], request: BaseModel, subject: object, progress: Progress | None = None
) -> ResultT:
    """Run a job to its end in a process of its own.

    Args:
        job: what to run.
        request: its argument.
        subject: what it works on, for messages: a build's folder.
        progress: called with what is done and what there is to do.

    Raises:
        GlmQuantError: the child's own, of the same type and with the same words; or the job's
            `crash_error`, with the child's last lines, if it ended without a result.
    """
    with tempfile.TemporaryDirectory(prefix="glm-quant-") as name:
        folder = Path(name)
        input_path, output_path = folder / "request.json", folder / "result.json"
        stderr_path = folder / "stderr"
        input_path.write_text(request.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", __name__, job.function]
        command += [str(input_path), str(output_path), *job.blocked_modules]
        status = _run(command, stderr_path, progress)
        failure_path = _failure_path(output_path)
        if failure_path.is_file():
            raise _error(_Failure.model_validate_json(failure_path.read_bytes()))
        if status != 0 or not output_path.is_file():
            purpose = f"{subject}: the process that {job.purpose}"
            raise job.crash_error(_crash_message(purpose, status, stderr_path))
        return job.result.model_validate_json(output_path.read_bytes())


def _run(command: Sequence[str], stderr_path: Path, progress: Progress | None) -> int:
    """Run the child to its end; returns its exit status."""
    with stderr_path.open("wb") as stderr:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=users_environment(),
            start_new_session=True,
        )
        note_child(child)
        try:
            for line in child.stdout or ():
                _pass_on(line, progress)
            return child.wait()
        finally:
            end_child(child)


def _pass_on(line: str, progress: Progress | None) -> None:
    """Report the progress or the log record in a line; whatever a model's code prints is neither.

    Raises:
        Exception: what `progress` raises, to end the child.
    """
    try:
        message = json.loads(line)
        if "log" in message:
            name, level, text = message["log"]
            logging.getLogger(str(name)).log(int(level), "%s", text)
            return
        done, total = int(message["done"]), int(message["total"])
    except (ValueError, TypeError, KeyError):
        return
    if progress:
        progress(done, total)


def _error(failure: _Failure) -> GlmQuantError:
    error: GlmQuantError = getattr(errors, failure.kind)(failure.message)
    error.may_pass = failure.may_pass
    return error


def _crash_message(purpose: str, status: int, stderr_path: Path) -> str:
    with stderr_path.open(encoding="utf-8", errors="replace") as file:
        tail = deque((line.rstrip() for line in file if line.strip()), maxlen=_STDERR_LINES)
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    lines = "\n".join(f"  {line}" for line in tail) or "  (it printed nothing)"
    return (
        f"{purpose} {how}. Its last lines:\n{lines}\n"
        "The build itself is kept; run again after removing the cause."
    )


def _failure_path(output_path: Path) -> Path:
    return output_path.with_name("failure.json")


def _child(function: str, input_path: Path, output_path: Path) -> None:
    """Be the child: apply the function to the request in one file, write its result to another."""
    end_with_parent()
    _send_log_records()
    module, _, name = function.partition(":")
    answer = cast("Callable[[Any, Progress], BaseModel]", getattr(import_module(module), name))
    request_type: type[BaseModel] = next(iter(get_type_hints(answer).values()))
    try:
        with disk_errors_named():
            request = request_type.model_validate_json(input_path.read_bytes())
            result = answer(request, lambda done, total: _send({"done": done, "total": total}))
    except GlmQuantError as error:
        failure = _Failure(kind=type(error).__name__, message=str(error), may_pass=error.may_pass)
        write_atomic(_failure_path(output_path), failure.model_dump_json().encode())
        sys.exit(1)
    write_atomic(output_path, (result.model_dump_json(indent=1) + "\n").encode())


def _send(message: dict[str, Any]) -> None:
    # One write a line: threads that report at the same time must not mix their lines.
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


class _ParentHandler(logging.Handler):
    """Sends log records to the parent, which decides what is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Send one."""
        _send({"log": [record.name, record.levelno, record.getMessage()]})


def _send_log_records() -> None:
    logger = logging.getLogger(_PACKAGE)
    logger.addHandler(_ParentHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False


if __name__ == "__main__":
    for blocked in sys.argv[4:]:
        # None in sys.modules makes an import fail, as if the package were not installed.
        sys.modules[blocked] = cast("Any", None)
    _child(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
