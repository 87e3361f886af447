"""The command line: `glm-quant demo | run | publish | convert | plan | verify | status | worker …`.

Exit codes: 0 done, 1 the run failed, 2 bad input. With `--json` standard output is one JSON value.
"""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deployments import service
from deployments.launchd_systemd import service_app
from flows.cli.approve import approve
from flows.cli.measuring import calibrate, fit, imatrix
from flows.cli.options import Json, RecipeOption, Reuse, Source, Verbose, Window
from flows.cli.stopping import stopping_in_order
from flows.cli.terminal import (
    ERRORS,
    OUT,
    Terminal,
    errors_in_one_screen,
    print_json,
    status_table,
)
from flows.environment import prepare
from glm_quant.build import Build, BuildSpec, open_build, require_free
from glm_quant.evaluation.baselines import parse_baselines
from glm_quant.hub import DEFAULT_WINDOW
from glm_quant.recipe import S3_PLACE
from glm_quant.status import read_status
from glm_quant.workspace import Workspace

if TYPE_CHECKING:
    from glm_quant.quantize.command import ConvertSummary

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make mixed-precision MLX builds of GLM checkpoints, streaming, and prove what was made.",
)


@app.command()
def demo(
    workspace: Annotated[Path, typer.Option(help="Folder to work in.")] = Path("workspace/demo"),
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Take the small trained checkpoint that ships through every stage to a published build."""
    from glm_quant.data import tiny_glm_path

    source, yardstick = str(tiny_glm_path()), "uniform-4bit"
    baseline = Workspace(workspace).baselines / yardstick
    spec = BuildSpec(
        recipe="demo",
        source=source,
        workspace=str(workspace),
        targets=(str(workspace / "published" / "tiny-glm-mlx"),),
        baselines={yardstick: str(baseline)},
    )
    with errors_in_one_screen(verbose), stopping_in_order(ERRORS):
        require_free(spec)
        ERRORS.print(f"{yardstick}, to compare with:")
        _convert(source, yardstick, baseline)
        ERRORS.print("the build:")
    _release(spec, verbose, as_json)


def _s3_place(value: str | None) -> str | None:
    if value is not None and not re.match(S3_PLACE, value):
        raise typer.BadParameter(f"{value}: give a place in S3, s3://bucket/prefix.")
    return value


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Path of a .yaml file, or a name in recipes/.")],
    source: Source = None,
    workspace: Annotated[Path, typer.Option(help="Folder to work in.")] = Path("workspace"),
    publish: Annotated[
        list[str] | None, typer.Option(help="Where to publish; may be given again.")
    ] = None,
    window: Window = DEFAULT_WINDOW,
    reuse: Reuse = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PLACE of a build to compare with; may be given again."),
    ] = None,
    records: Annotated[
        str | None,
        typer.Option(
            help="s3://bucket/prefix to copy the records to, so that another machine can go on.",
            callback=_s3_place,
        ),
    ] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Run the whole flow in this process. The same command again resumes."""
    with errors_in_one_screen(verbose):
        baselines = parse_baselines(baseline or ())
    spec = BuildSpec(
        recipe=recipe,
        source=source,
        workspace=str(workspace),
        window=window,
        reuse=tuple(reuse or ()),
        targets=tuple(publish or ()),
        baselines=baselines,
        records=records,
    )
    _release(spec, verbose, as_json)


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
        return _release(spec, verbose, as_json)
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
def convert(
    source: Annotated[str, typer.Option(help="Folder or URI of the checkpoint.")],
    recipe: RecipeOption,
    output: Annotated[Path, typer.Option(help="Folder to make.")],
    workers: Annotated[int | None, typer.Option(help="Threads; default: one a core.")] = None,
    window: Window = DEFAULT_WINDOW,
    reuse: Reuse = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Plan, quantize, assemble, and no more: the drop-in for mlx_lm.convert."""
    with errors_in_one_screen(verbose), stopping_in_order(ERRORS):
        summary = _convert(source, recipe, output, workers, window, reuse or ())
        if as_json:
            print_json(summary.model_dump())
        else:
            OUT.print(f"{summary.output}: {summary.describe()}")


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


def _convert(
    source: str,
    recipe: str,
    output: Path,
    workers: int | None = None,
    window: int = DEFAULT_WINDOW,
    reuse: Sequence[str] = (),
) -> "ConvertSummary":
    """Convert into a folder and show it."""
    from glm_quant.calibration.command import open_calibrated
    from glm_quant.hub import open_source
    from glm_quant.quantize.command import convert_to_folder, workspace_beside

    opened = open_source(source, workspace_beside(output), window)
    conversion = open_calibrated(
        opened, recipe, output, lambda: Terminal(ERRORS, 1), workers, reuse
    )
    with Terminal(ERRORS, len(conversion.shards)) as terminal:
        return convert_to_folder(conversion, terminal)


def _release(spec: BuildSpec, verbose: bool, as_json: bool) -> None:
    """Run the flow in this process and show its result."""
    prepare(verbose)
    with errors_in_one_screen(verbose):
        begin = time.monotonic()
        # A taken workspace fails here, before Prefect is started, and so does bad input. The commit
        # that another machine began with is known before the source is opened.
        require_free(spec)
        build = open_build(spec)
        from flows.release import release
        from tasks.progress import watch

        with Terminal(ERRORS, len(build.plan.shards)) as terminal:
            watch(terminal)
            done = release(spec)
        seconds = round(time.monotonic() - begin, 1)
        checkpoint = build.workspace.checkpoint
        if as_json:
            result = {
                "checkpoint": str(checkpoint),
                "card": str(checkpoint / "README.md"),
                "published": list(build.targets),
                "seconds": seconds,
                "stages": [stage.model_dump() for stage in done],
            }
            print_json(result)
            return
        from glm_quant.report.summary import result_summary
        from glm_quant.stages.releasing import card_inputs

        OUT.print(result_summary(card_inputs(build.workspace), checkpoint, build.targets))
        OUT.print(f"[dim]{seconds:,.0f} seconds[/]")


if __name__ == "__main__":
    main()
