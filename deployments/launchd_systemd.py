"""The server and the worker as services of the system, for `glm-quant service install`.

On a Mac three LaunchAgents of the user (the third keeps the logs short), on Linux two systemd user
units, whose logs are the journal's. Their templates are the files in `units/`; what is filled in is
the interpreter and the folder they were installed from, and nothing else of the machine.
"""

import plistlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from glm_quant.artifact import write_atomic
from glm_quant.errors import InputError

LOG_BYTES = 20 << 20
LOGS_KEPT = 3
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_AGENTS = tuple(f"org.glm-quant.{name}.plist" for name in ("server", "worker", "logs"))
_UNITS = tuple(f"glm-quant-{name}.service" for name in ("server", "worker"))


@dataclass(frozen=True)
class Place:
    """Where a service runs: all that a unit knows of its machine."""

    python: Path
    home: Path

    @property
    def logs(self) -> Path:
        """The folder of the log files, on a Mac."""
        return self.home / "logs"


@dataclass(frozen=True)
class ServiceUnits:
    """The files that make services of server and worker, and what a person types to start them."""

    files: Mapping[Path, bytes]
    start_lines: tuple[str, ...]


def service_units(place: Place) -> ServiceUnits:
    """Return the units for the system of this machine."""
    mac = sys.platform == "darwin"
    folder = Path("~/Library/LaunchAgents" if mac else "~/.config/systemd/user").expanduser()
    contents = launch_agents(place) if mac else systemd_units(place)
    if mac:
        lines = tuple(f"launchctl bootstrap gui/$(id -u) {folder / name}" for name in contents)
    else:
        lines = (
            "systemctl --user daemon-reload",
            f"systemctl --user enable --now {' '.join(contents)}",
            "loginctl enable-linger  # they run without anybody logged in",
        )
    return ServiceUnits({folder / name: content for name, content in contents.items()}, lines)


def install_units(place: Place, units: ServiceUnits) -> None:
    """Write the units, and make the folders that they name."""
    place.home.mkdir(parents=True, exist_ok=True)
    if sys.platform == "darwin":  # launchd does not make the folder of its logs
        place.logs.mkdir(exist_ok=True)
    for path, content in units.files.items():
        write_atomic(path, content)


def launch_agents(place: Place) -> dict[str, bytes]:
    """Return the property lists of the LaunchAgents by file name."""
    values = {"python": str(place.python), "home": str(place.home), "logs": str(place.logs)}
    return {
        name: plistlib.dumps(
            _filled_in(plistlib.loads(_template(name).encode()), values), sort_keys=False
        )
        for name in _AGENTS
    }


def systemd_units(place: Place) -> dict[str, bytes]:
    """Return the systemd user units by file name."""
    values = {
        "python": _systemd_word(str(place.python)),
        "home": _systemd_word(str(place.home)),
        # Not a word of a command line: here only `%` means something.
        "folder": str(place.home).replace("%", "%%"),
    }
    return {name: _filled_in(_template(name), values).encode() for name in _UNITS}


def rotate_logs(folder: Path, largest: int) -> list[Path]:
    """Shorten the log files in a folder that have grown above a size; returns which.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder. Give the one of the log files.")
    return [path for path in sorted(folder.glob("*.log")) if rotate_log(path, largest)]


def rotate_log(path: Path, largest: int = LOG_BYTES, keep: int = LOGS_KEPT) -> bool:
    """Copy a large log aside and empty it; returns whether it was large.

    launchd opens logs for appending and keeps them open, so the file stays and is cut. What is
    written between the copy and the cut is lost: a line at most.
    """
    if path.stat().st_size <= largest:
        return False
    for number in range(keep - 1, 0, -1):
        older = path.with_name(f"{path.name}.{number}")
        if older.exists():
            older.replace(path.with_name(f"{path.name}.{number + 1}"))
    write_atomic(path.with_name(f"{path.name}.1"), path.read_bytes())
    with path.open("r+b") as file:
        file.truncate(0)
    return True


def _template(name: str) -> str:
    return files("deployments").joinpath("units", name).read_text(encoding="utf-8")


def _filled_in(value: Any, values: Mapping[str, str]) -> Any:
    """Return a template, or a property list of templates, with every `{name}` replaced."""
    if isinstance(value, dict):
        return {key: _filled_in(item, values) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled_in(item, values) for item in value]
    if isinstance(value, str):
        # In one pass: a path may look like a placeholder.
        return _PLACEHOLDER.sub(lambda match: values[match[1]], value)
    return value


def _systemd_word(word: str) -> str:
    """Return a word of a command line as systemd reads it back: `%` begins a specifier there."""
    return word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
