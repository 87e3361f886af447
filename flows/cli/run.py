"""Commands that make a build: `demo`, `run`, `convert`."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.api_address import connect_if_there
from flows.cli.display import StageDisplay
from flows.cli.options import Json, RecipeOption, Replace, Reuse, Source, Verbose, Window
from flows.cli.stopping import stopping_in_order
from flows.cli.terminal import ERRORS, OUT, errors_in_one_screen, print_json
from flows.environment import prepare
from glm_quant.build import Build, BuildSpec, require_free
from glm_quant.evaluation.baselines import parse_baselines
from glm_quant.hub import DEFAULT_WINDOW
from glm_quant.recipe import S3_PLACE
from glm_quant.workspace import Workspace

if TYPE_CHECKING:
    from glm_quant.convert import ConvertSummary
    from glm_quant.stages.base import StageResult


def demo(
    workspace: Annotated[Path, typer.Option(help="Folder to work in.")] = Path("workspace/demo"),
    replace: Replace = False,
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
        replace=replace,
    )
    with errors_in_one_screen(verbose), stopping_in_order(ERRORS):
        require_free(spec)
        ERRORS.print(f"{yardstick}, to compare with:")
        _convert(source, yardstick, baseline)
        ERRORS.print("the build:")
    release_build(spec, verbose, as_json)


def _s3_place(value: str | None) -> str | None:
    if value is not None and not re.match(S3_PLACE, value):
        raise typer.BadParameter(f"{value}: give a place in S3, s3://bucket/prefix.")
    return value


def run(
    recipe: Annotated[str, typer.Argument(help="Path of a .yaml file, or a name in recipes/.")],
    source: Source = None,
    workspace: Annotated[
        Path | None,
        typer.Option(help="Folder to work in; default: workspace/SOURCE-RECIPE, by both names."),
    ] = None,
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
    replace: Replace = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Run the whole flow in this process. The same command again resumes."""
    with errors_in_one_screen(verbose):
        baselines = parse_baselines(baseline or ())
    spec = BuildSpec(
        recipe=recipe,
        source=source,
        workspace=str(workspace) if workspace else None,
        window=window,
        reuse=tuple(reuse or ()),
        targets=tuple(publish or ()),
        baselines=baselines,
        records=records,
        replace=replace,
    )
    release_build(spec, verbose, as_json)


def convert(
    source: Annotated[str, typer.Option(help="Folder or URI of the checkpoint.")],
    recipe: RecipeOption,
    output: Annotated[Path, typer.Option(help="Folder to make.")],
    workers: Annotated[int | None, typer.Option(help="Threads; default: one a core.")] = None,
    window: Window = DEFAULT_WINDOW,
    reuse: Reuse = None,
    replace: Replace = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Plan, quantize, assemble, and no more: the drop-in for mlx_lm.convert."""
    with errors_in_one_screen(verbose), stopping_in_order(ERRORS):
        from glm_quant.convert import require_output_free

        require_output_free(source, recipe, output, replace)
        summary = _convert(source, recipe, output, workers, window, reuse or ())
        if as_json:
            print_json(summary.model_dump())
        else:
            OUT.print(f"{summary.output}: {summary.describe()}")


def release_build(spec: BuildSpec, verbose: bool, as_json: bool) -> None:
    """Run the flow in this process and show its result."""
    prepare(verbose)
    with errors_in_one_screen(verbose), stopping_in_order(ERRORS):
        begin = time.monotonic()
        # A taken workspace fails here, before Prefect is started, and so does bad input. The commit
        # that another machine began with is known before the source is opened.
        require_free(spec)
        build = Build(spec)
        from glm_quant.plan_checks import judge_plan
        from glm_quant.stages.finished import finished_results
        from glm_quant.stages.targets import judge_targets

        for warning in judge_plan(build):
            ERRORS.print(warning, markup=False, highlight=False)
        results = finished_results(build)
        if results is None:
            judge_targets(build)
            results = _run_flow(build)
        else:
            ERRORS.print(
                f"nothing to do: every stage of {build.recipe.name} in {build.workspace.root} is "
                "done.",
                markup=False,
                highlight=False,
            )
        _print_result(build, results, round(time.monotonic() - begin, 1), as_json)


def _print_result(build: Build, stages: "list[StageResult]", seconds: float, as_json: bool) -> None:
    """Print what a run came to."""
    checkpoint = build.workspace.checkpoint
    if as_json:
        result = {
            "checkpoint": str(checkpoint),
            "card": str(checkpoint / "README.md"),
            "published": list(build.targets),
            "seconds": seconds,
            "stages": [stage.model_dump() for stage in stages],
        }
        print_json(result)
        return
    from glm_quant.report.summary import result_summary
    from glm_quant.stages.card import card_inputs

    OUT.print(result_summary(card_inputs(build.workspace), checkpoint, build.targets))
    OUT.print(f"[dim]{seconds:,.0f} seconds[/]")


def _run_flow(build: Build) -> "list[StageResult]":
    """Run the flow of a build; returns what its stages came to."""
    from flows.temporary_server import require_home, start_server

    require_home()
    notice = connect_if_there()
    if notice:
        ERRORS.print(notice)
    from glm_quant.stages.quantize import QuantizeStage

    unfinished = [
        shard.size_bytes
        for number, shard in enumerate(build.plan.shards)
        if QuantizeStage(build, number).current() is None
    ]
    with StageDisplay(ERRORS, unfinished) as display:
        wait_for_server = start_server()
        from flows.release import release  # meanwhile
        from tasks.progress import watch

        wait_for_server()
        watch(display)
        return release(build.spec)


def _convert(
    source: str,
    recipe: str,
    output: Path,
    workers: int | None = None,
    window: int = DEFAULT_WINDOW,
    reuse: Sequence[str] = (),
) -> "ConvertSummary":
    """Convert into a folder and show it."""
    from glm_quant.convert import convert_to_folder, open_conversion

    build = open_conversion(source, recipe, output, workers, window, reuse)
    with StageDisplay(ERRORS, [shard.size_bytes for shard in build.plan.shards]) as display:
        return convert_to_folder(build, display)
