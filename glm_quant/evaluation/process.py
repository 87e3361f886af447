"""A measurement in a process of its own, so that a crash of the model does not take the flow.

The child gets a request in a file and leaves its result in another; how far it is it says in lines
on stdout. It ends itself when its stdin closes, so that a killed flow does not leave a process
behind that holds hundreds of gigabytes.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from glm_quant import errors
from glm_quant.artifact import write_atomic
from glm_quant.errors import EvaluationError, GlmQuantError
from glm_quant.model.precision import users_environment

Progress = Callable[[int, int], None]

_STDERR_LINES = 12


class _Complaint(BaseModel):
    """An error of ours that ended the child, to be raised again here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    message: str
    may_pass: bool


def run_apart(module: str, request: BaseModel, what: str, progress: Progress | None) -> bytes:
    """Let a module's process answer a request; returns what it wrote.

    Args:
        module: as `python -m` takes it; it calls `serve`.
        request: for the child.
        what: is measured, for messages.
        progress: called with what is done and what there is to do.

    Raises:
        EvaluationError: the process crashed; its last words are in the message.
        GlmQuantError: the child's own, as it was there.
    """
    with tempfile.TemporaryDirectory(prefix="glm-quant-") as name:
        folder = Path(name)
        asked, output, stderr = folder / "request.json", folder / "result.json", folder / "stderr"
        asked.write_text(request.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", module, str(asked), str(output)]
        status = _run(command, stderr, progress)
        complaint = _complaint_beside(output)
        if complaint.is_file():
            raise _raised(_Complaint.model_validate_json(complaint.read_bytes()))
        if status != 0 or not output.is_file():
            raise EvaluationError(_what_happened(what, status, stderr))
        return output.read_bytes()


def serve(arguments: list[str], answer: Callable[[bytes, Progress], BaseModel]) -> None:
    """Be the child: answer the request in the file `arguments[0]` into the file `arguments[1]`.

    Args:
        arguments: of the command line.
        answer: makes the result from the request's JSON; is given what tells the progress.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    output = Path(arguments[1])
    try:
        result = answer(Path(arguments[0]).read_bytes(), _say)
    except GlmQuantError as error:
        told = _Complaint(kind=type(error).__name__, message=str(error), may_pass=error.may_pass)
        write_atomic(_complaint_beside(output), told.model_dump_json().encode())
        sys.exit(1)
    write_atomic(output, (result.model_dump_json(indent=1) + "\n").encode())


def _complaint_beside(output: Path) -> Path:
    return output.with_name("complaint.json")


def _raised(complaint: _Complaint) -> GlmQuantError:
    error: GlmQuantError = getattr(errors, complaint.kind)(complaint.message)
    error.may_pass = complaint.may_pass
    return error


def _run(command: list[str], stderr: Path, progress: Progress | None) -> int:
    """Run the child to its end; returns its exit status."""
    with stderr.open("wb") as file:
        # stdin stays open as long as this process lives: the child ends when it closes.
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=users_environment(),
        )
        try:
            _follow(child, progress)
            return child.wait()
        finally:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe:
                    pipe.close()


def _follow(child: subprocess.Popen[str], progress: Progress | None) -> None:
    """Pass the child's progress on; what else is printed by a model's code is not ours."""
    for line in child.stdout or ():
        try:
            said = json.loads(line)
            done, total = int(said["done"]), int(said["total"])
        except (ValueError, TypeError, KeyError):
            continue
        if progress:
            progress(done, total)


def _what_happened(what: str, status: int, stderr: Path) -> str:
    with stderr.open(encoding="utf-8", errors="replace") as file:
        tail = deque((line.rstrip() for line in file if line.strip()), maxlen=_STDERR_LINES)
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    lines = "\n".join(f"  {line}" for line in tail) or "  (it said nothing)"
    return (
        f"{what} {how}. Its last words:\n{lines}\n"
        "The build itself is kept; run again after removing the cause."
    )


def _say(done: int, total: int) -> None:
    sys.stdout.write(json.dumps({"done": done, "total": total}) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    # A raw read: a buffered one would hold a lock that the interpreter needs to end.
    while os.read(0, 4096):
        pass
    os._exit(1)
