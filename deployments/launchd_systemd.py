"""`glm-quant service install`: the server and the worker as services of the system.

On a Mac three LaunchAgents of the user (the third keeps the logs short), on Linux two systemd user
units, whose logs are the journal's. They name the interpreter and the folder they were installed
from, and nothing else of the machine.
"""

import plistlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.terminal import errors_in_one_screen
from glm_quant.artifact import write_atomic
from glm_quant.errors import InputError

service_app = typer.Typer(no_args_is_help=True, help="Run server and worker as system services.")

LABEL = "org.glm-quant"
LOG_BYTES = 20 << 20
LOGS_KEPT = 3
_NIGHTLY = {"Hour": 4, "Minute": 10}


@dataclass(frozen=True)
class Place:
    """Where a service runs: all that a unit knows of its machine."""

    python: Path
    home: Path

    @property
    def logs(self) -> Path:
        """The folder of the log files, on a Mac."""
        return self.home / "logs"

    def command(self, *arguments: str) -> list[str]:
        """Return a command line of `glm-quant` with this interpreter."""
        return [str(self.python), "-P", "-m", "flows.cli.main", *arguments]


@service_app.command()
def install(
    home: Annotated[
        Path, typer.Option(help="Folder that paths in deployments are relative to.")
    ] = Path(),
    dry_run: Annotated[bool, typer.Option(help="Print the files, write nothing.")] = False,
) -> None:
    """Write the units, and say how to start them."""
    place = Place(Path(sys.executable), home.expanduser().absolute())
    mac = sys.platform == "darwin"
    files = launch_agents(place) if mac else systemd_units(place)
    folder = Path("~/Library/LaunchAgents" if mac else "~/.config/systemd/user").expanduser()
    if not dry_run:
        place.home.mkdir(parents=True, exist_ok=True)
        place.logs.mkdir(exist_ok=mac)
    for name, content in files.items():
        if dry_run:
            typer.echo(f"# {folder / name}\n{content.decode()}")
        else:
            write_atomic(folder / name, content)
            typer.echo(f"wrote {folder / name}", err=True)
    typer.echo("Start them:", err=True)
    for line in _start_lines(folder, list(files), mac):
        typer.echo(f"  {line}", err=True)


@service_app.command()
def rotate(
    folder: Annotated[Path, typer.Argument(help="Folder of log files.")],
    largest: Annotated[int, typer.Option(help="Bytes above which a file is rotated.")] = LOG_BYTES,
) -> None:
    """Shorten log files that have grown; whoever writes them need not know."""
    with errors_in_one_screen():
        if not folder.is_dir():
            raise InputError(f"{folder}: there is no such folder. Give the one of the log files.")
        for path in sorted(folder.glob("*.log")):
            if rotate_log(path, largest):
                typer.echo(f"rotated {path}")


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


def launch_agents(place: Place) -> dict[str, bytes]:
    """Return the property lists of the LaunchAgents by file name."""
    server = _agent(place, "server", place.command("server"))
    worker = _agent(place, "worker", place.command("worker", "--home", str(place.home)))
    logs = _agent(place, "logs", place.command("service", "rotate", str(place.logs)))
    del logs["KeepAlive"], logs["RunAtLoad"]
    logs["StartCalendarInterval"] = _NIGHTLY
    agents = (server, worker, logs)
    return {f"{agent['Label']}.plist": plistlib.dumps(agent, sort_keys=False) for agent in agents}


def systemd_units(place: Place) -> dict[str, bytes]:
    """Return the systemd user units by file name."""
    worker = place.command("worker", "--home", str(place.home))
    return {
        "glm-quant-server.service": _unit(place, "Prefect server", place.command("server")),
        "glm-quant-worker.service": _unit(place, "worker", worker, "glm-quant-server.service"),
    }


def _agent(place: Place, name: str, command: list[str]) -> dict[str, Any]:
    """Return a LaunchAgent that is started at login and again whenever it ends."""
    log = str(place.logs / f"{name}.log")
    return {
        "Label": f"{LABEL}.{name}",
        "ProgramArguments": command,
        "WorkingDirectory": str(place.home),
        "RunAtLoad": True,
        "KeepAlive": True,
        "ThrottleInterval": 30,
        # A conversion must not be slowed down as background work.
        "ProcessType": "Interactive",
        # A run outlives the worker that started it.
        "AbandonProcessGroup": True,
        "StandardOutPath": log,
        "StandardErrorPath": log,
    }


def _unit(place: Place, what: str, command: list[str], after: str = "") -> bytes:
    """Return a unit that is started again whenever it ends."""
    words = " ".join(f'"{_escaped(word)}"' for word in command)
    order = f"Wants={after}\nAfter={after}\n" if after else ""
    return f"""\
[Unit]
Description=glm-quant {what}
{order}
[Service]
ExecStart={words}
WorkingDirectory={_escaped(str(place.home))}
EnvironmentFile=-%h/.config/glm-quant.env
Restart=always
RestartSec=30
# A run outlives the worker that started it.
KillMode=process

[Install]
WantedBy=default.target
""".encode()


def _escaped(word: str) -> str:
    """Return a word as systemd reads it back: `%` begins a specifier there."""
    return word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")


def _start_lines(folder: Path, names: list[str], mac: bool) -> list[str]:
    if mac:
        return [f"launchctl bootstrap gui/$(id -u) {folder / name}" for name in names]
    return [
        "systemctl --user daemon-reload",
        f"systemctl --user enable --now {' '.join(names)}",
        "loginctl enable-linger  # they run without anybody logged in",
    ]
