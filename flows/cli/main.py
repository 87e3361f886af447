"""The command line: `glm-quant demo | run | publish | convert | plan | verify | status | worker …`.

Exit codes: 0 done, 1 the run failed, 2 bad input, 129, 130 or 143 stopped. With `--json` standard
output is one JSON value.
"""

import typer

from flows.cli.approve import approve
from flows.cli.measuring import calibrate, fit, imatrix
from flows.cli.options import Json, RecipeOption, Source, Verbose
from flows.cli.run import convert, demo, run
from flows.cli.service import server, service_app, worker
from flows.cli.terminal import ERRORS, OUT, errors_in_one_screen, print_json
from flows.cli.workspace import card, publish, status, verify
from glm_quant.build import Build, BuildSpec

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
def plan(
    source: Source = None,
    recipe: RecipeOption = "dynamic-2.56bpw",
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Show what would be made, from config, index and headers alone."""
    with errors_in_one_screen(verbose):
        from glm_quant.plan_checks import judge_plan
        from glm_quant.report.summary import plan_summary
        from glm_quant.stages.plan import plan_figures

        build = Build(BuildSpec(recipe=recipe, source=source))
        if as_json:
            print_json(plan_figures(build).model_dump())
        else:
            title = f"{build.recipe.name}: {build.checkpoint.source.uri}"
            limit = build.checkpoint.config.get("max_position_embeddings")
            OUT.print(plan_summary(build.plan, title, limit, build.conversion.outputs))
        # The bytes can be planned whatever the recipe says of measuring them.
        for warning in judge_plan(build, here=False):
            ERRORS.print(warning, markup=False, highlight=False)


app.command()(publish)
app.command()(verify)
app.command()(status)
app.command()(card)
app.command()(calibrate)
app.command()(imatrix)
app.command()(fit)
app.command()(approve)
app.command()(server)
app.command()(worker)
app.add_typer(service_app, name="service")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
