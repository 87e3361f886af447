"""Commands on a workspace or a finished build: publish, verify, status, card."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.display import StageDisplay
from flows.cli.options import Json, Source, Verbose
from flows.cli.stopping import stopping_in_order
from flows.cli.terminal import ERRORS, OUT, errors_in_one_screen, print_json, status_table
from glm_quant.status import read_status
from glm_quant.workspace import Workspace, existing_workspace


def publish(
    workspace: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    to: Annotated[
        list[str],
        typer.Option(help="Folder, hf://org/name or s3://bucket/prefix; may be given again."),
    ],
    dry_run: Annotated[bool, typer.Option(help="Show what would change, write nothing.")] = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Publish a finished build by its records: neither recipe nor source is needed."""
    with errors_in_one_screen(verbose):
        from glm_quant.stages.publish_recorded import publish_recorded

        place = existing_workspace(str(workspace))
        if dry_run:
            return _show_changes(place, to, as_json)
        with stopping_in_order(ERRORS), StageDisplay(ERRORS) as terminal:
            records = publish_recorded(place, to, terminal)
        if as_json:
            print_json([record.model_dump() for record in records])
        for record in () if as_json else records:
            OUT.print(f"{record.url}: {record.change}")
    return None


def _show_changes(workspace: Workspace, targets: list[str], as_json: bool) -> None:
    """Show what publishing would change at each target."""
    from dataclasses import asdict

    from glm_quant.stages.publish_recorded import RecordedBuild

    build = RecordedBuild.open(workspace)
    diffs = {uri: build.diff(uri) for uri in targets}
    if as_json:
        print_json({uri: asdict(diff) for uri, diff in diffs.items()})
        return
    for uri, diff in diffs.items():
        OUT.print(f"{uri}: {diff.describe()}")
        for kind, files in (("+", diff.added), ("~", diff.changed), ("-", diff.deleted)):
            for file in files:
                OUT.print(f"  {kind} {file.name} ({file.size_bytes:,} bytes)")


def verify(
    folder: Annotated[Path, typer.Argument(help="A finished output.")],
    source: Source = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(help="What it was calibrated with: calibration/imatrix in a workspace."),
    ] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Check a finished output: digests, index, shards, config, and its source if given."""
    with errors_in_one_screen(verbose):
        from dataclasses import asdict

        from glm_quant.hub import open_source
        from glm_quant.quantize.verify import verify as check

        found = check(folder, open_source(source) if source else None, imatrix=imatrix)
        if as_json:
            print_json(asdict(found))
            return
        rederived = (
            f", {found.rederived_blocks} blocks made again from the source and equal"
            if source
            else ""
        )
        if found.calibrated:
            rederived += f" ({found.calibrated} others need --imatrix)"
        OUT.print(
            f"{folder}: whole. {found.files} files and {found.size_bytes / 1e9:,.3f} GB have their "
            f"recorded sha256, {found.tensors:,} tensors agree with index and config{rederived}."
        )


def status(
    workspace: Annotated[Path, typer.Argument(help="The folder of a run.")],
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Show what is done in a workspace, what is left, what failed and why."""
    with errors_in_one_screen(verbose):
        found = read_status(workspace)
        if as_json:
            print_json(found.model_dump())
            return
        OUT.print(status_table(found))


def card(
    workspace: Annotated[Path, typer.Argument(help="The folder of a finished run, or its output.")],
    output: Annotated[
        Path | None, typer.Option(help="The build, if it is not in the workspace.")
    ] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Render card and charts again from the records: nothing is measured, no source is needed."""
    with errors_in_one_screen(verbose):
        from glm_quant.stages.card import render_again

        place = existing_workspace(str(workspace))
        place = Workspace(place.root, output.expanduser().absolute() if output else place.output)
        record = render_again(place)
        if as_json:
            print_json(record.model_dump())
        else:
            OUT.print(f"{place.checkpoint}: {', '.join(file.path for file in record.outputs)}")
