"""The command line: `glm-quant demo | run | publish | convert | plan | verify | status | worker …`.

Exit codes: 0 done, 1 the run failed, 2 bad input. With `--json` standard output is one JSON value.
"""

from pathlib import Path
from typing import Annotated

import typer

from deployments import service
from deployments.launchd_systemd import service_app
from flows.cli.approve import approve
from flows.cli.measuring import calibrate, fit, imatrix
from flows.cli.options import Json, RecipeOption, Source, Verbose
from flows.cli.run import convert, demo, release_build, run
from flows.cli.terminal import (
    OUT,
    errors_in_one_screen,
    print_json,
    status_table,
)
from glm_quant.build import Build, BuildSpec, open_build
from glm_quant.status import read_status

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make mixed-precision MLX builds of GLM checkpoints, streaming, and prove what was made.",
)
app.command()(demo)
app.command()(run)
app.command()(convert)


@app.command()
def publish(
    recipe: Annotated[str, typer.Argument(help="Path of a .yaml file, or a name in recipes/.")],
    to: Annotated[list[str], typer.Option(help="Folder, hf://org/name or s3://bucket/prefix.")],
    source: Source = None,
    workspace: Annotated[Path, typer.Option(help="Folder of the build.")] = Path("workspace"),
    dry_run: Annotated[bool, typer.Option(help="Show what would change, write nothing.")] = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Publish a build: `run` with more targets; with --dry-run, what that would change."""
    spec = BuildSpec(recipe=recipe, source=source, workspace=str(workspace), targets=tuple(to))
    if not dry_run:
        return release_build(spec, verbose, as_json)
    with errors_in_one_screen(verbose):
        from dataclasses import asdict

        from glm_quant.stages.publishing import PublishStage

        build = open_build(spec)
        stages = [PublishStage(build, target) for target in build.targets]
        found = {stage.target: (stage.diff(), stage.leftovers()) for stage in stages}
        if as_json:
            print_json({t: asdict(diff) | {"leftovers": old} for t, (diff, old) in found.items()})
            return None
        for target, (diff, leftovers) in found.items():
            OUT.print(f"{target}: {diff.describe()}")
            for leftover in leftovers:
                OUT.print(f"  - {leftover} (of a build that was given up)")
            for kind, files in (("+", diff.added), ("~", diff.changed), ("-", diff.deleted)):
                for file in files:
                    OUT.print(f"  {kind} {file.name} ({file.size_bytes:,} bytes)")
    return None


@app.command()
def plan(
    source: Source = None,
    recipe: RecipeOption = "dynamic-2.56bpw",
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Show what would be made, from config, index and headers alone."""
    with errors_in_one_screen(verbose):
        from glm_quant.report.summary import plan_summary
        from glm_quant.stages.making import plan_figures

        build = Build(BuildSpec(recipe=recipe, source=source))
        if as_json:
            print_json(plan_figures(build).model_dump())
        else:
            title = f"{build.recipe.name}: {build.checkpoint.source.uri}"
            limit = build.checkpoint.config.get("max_position_embeddings")
            OUT.print(plan_summary(build.plan, title, limit, build.conversion.schedule))


@app.command()
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


@app.command()
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


@app.command()
def card(
    workspace: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    output: Annotated[
        Path | None, typer.Option(help="The build, if it is not in the workspace.")
    ] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Render card and charts again from the records: nothing is measured, no source is needed."""
    with errors_in_one_screen(verbose):
        from glm_quant.stages.releasing import render_again
        from glm_quant.workspace import Workspace, existing_workspace

        place = existing_workspace(str(workspace))
        place = Workspace(place.root, output.expanduser().absolute() if output else place.output)
        record = render_again(place)
        if as_json:
            print_json(record.model_dump())
        else:
            OUT.print(f"{place.checkpoint}: {', '.join(file.path for file in record.outputs)}")


app.command()(calibrate)
app.command()(imatrix)
app.command()(fit)
app.command()(approve)
app.command()(service.server)
app.command()(service.worker)
app.add_typer(service_app, name="service")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
