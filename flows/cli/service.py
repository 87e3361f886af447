"""The commands of the service: `glm-quant server`, `glm-quant worker`, `glm-quant service …`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from deployments.launchd_systemd import (
    LOG_BYTES,
    Place,
    install_units,
    rotate_logs,
    service_units,
)
from deployments.server import run_server
from deployments.worker import POOL, connect_worker, run_prefect_worker, set_up
from flows.cli.terminal import errors_in_one_screen

service_app = typer.Typer(no_args_is_help=True, help="Run server and worker as system services.")

Home = Annotated[Path, typer.Option(help="Folder that paths in deployments are relative to.")]


def server(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the API and the UI.")] = 4200,
    save_address: Annotated[
        bool,
        typer.Option(
            "--save-address",
            help="Write the address into your Prefect profile: `prefect` then finds this server.",
        ),
    ] = False,
) -> None:
    """Run Prefect's server: the API, the UI, the schedule. Stays in the foreground."""
    typer.echo(f"The UI: http://{host}:{port}. Next: `glm-quant worker`.", err=True)
    run_server(host, port, save_address)


def worker(
    home: Home = Path(),
    deployments: Annotated[
        Path | None, typer.Option(help="A prefect.yaml of your own instead of the shipped one.")
    ] = None,
    pool: Annotated[str, typer.Option(help="Work pool, made if it is missing.")] = POOL,
    once: Annotated[bool, typer.Option(help="Run what is due now, then end.")] = False,
) -> None:
    """Make pool, deployments and automation, mark dead runs, then run one build at a time."""
    with errors_in_one_screen():
        connect_worker(home)
        for line in set_up(pool, deployments):
            typer.echo(line, err=True)
        run_prefect_worker(pool, once)


@service_app.command()
def install(
    home: Home = Path(),
    dry_run: Annotated[bool, typer.Option(help="Print the files, write nothing.")] = False,
) -> None:
    """Write the units, and say how to start them."""
    place = Place(Path(sys.executable), home.expanduser().absolute())
    units = service_units(place)
    if not dry_run:
        install_units(place, units)
    for path, content in units.files.items():
        if dry_run:
            typer.echo(f"# {path}\n{content.decode()}")
        else:
            typer.echo(f"wrote {path}", err=True)
    typer.echo("Start them:", err=True)
    for line in units.start_lines:
        typer.echo(f"  {line}", err=True)


@service_app.command()
def rotate(
    folder: Annotated[Path, typer.Argument(help="Folder of log files.")],
    largest: Annotated[int, typer.Option(help="Bytes above which a file is rotated.")] = LOG_BYTES,
) -> None:
    """Shorten log files that have grown; their writers may keep them open."""
    with errors_in_one_screen():
        for path in rotate_logs(folder, largest):
            typer.echo(f"rotated {path}")
