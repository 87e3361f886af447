"""Commands that measure a source and need no flow: `calibrate`, `imatrix`, `fit`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.display import StageDisplay
from flows.cli.options import Json, RecipeOption, Verbose
from flows.cli.stopping import stopping_in_order
from flows.cli.terminal import ERRORS, OUT, errors_in_one_screen, fit_table, print_json
from glm_quant.settings import CalibrationSettings

if TYPE_CHECKING:
    from glm_quant.checkpoint.reader import Checkpoint

# What a recipe that says nothing of its calibration gets.
_AS_RECIPES = CalibrationSettings()


def calibrate(
    source: Annotated[str, typer.Option(help="Folder or URI of the checkpoint.")],
    output: Annotated[Path, typer.Option(help="Folder to make, for a recipe's `imatrix`.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text file, or JSON of conversations; default: built-in texts."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=16, help="At most so many tokens of each text.")] = (
        _AS_RECIPES.tokens
    ),
    context: Annotated[
        int, typer.Option(min=16, help="Tokens of a sequence.")
    ] = _AS_RECIPES.context,
    factors: Annotated[bool, typer.Option(help="Also make what the quantizer gptq needs.")] = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Stream texts through the source and record the importance of each weight's inputs."""
    with errors_in_one_screen(verbose), stopping_in_order(ERRORS):
        from glm_quant.calibration.calibrate import calibrate as stream
        from glm_quant.calibration.coverage import judge_coverage
        from glm_quant.calibration.texts import calibration_set, named_texts

        checkpoint = _open(source)
        settings = CalibrationSettings(
            texts=named_texts(text), tokens=max(tokens, context), context=context
        )
        batch = calibration_set(checkpoint, settings)
        count = sum(map(len, batch.sequences))
        for warning in judge_coverage(count, settings, checkpoint.config, "calibrate"):
            ERRORS.print(warning, markup=False, highlight=False)
        with StageDisplay(ERRORS) as terminal:
            terminal.begin("calibrate")
            record = stream(
                checkpoint,
                batch,
                output,
                factors=factors,
                progress=lambda done, total: terminal.move("calibrate", done, total),
            )
        if as_json:
            print_json(record.model_dump())
        else:
            OUT.print(f"{output}: {record.describe()}")


def imatrix(
    origin: Annotated[Path, typer.Argument(help="llama.cpp's imatrix (GGUF), or our folder.")],
    target: Annotated[Path, typer.Argument(help="The other of the two, to make.")],
    verbose: Verbose = False,
) -> None:
    """Read an imatrix of llama.cpp's into a folder for recipes, or write ours for llama.cpp."""
    with errors_in_one_screen(verbose):
        from glm_quant.calibration.llama_cpp import read_llama_cpp, write_llama_cpp

        if origin.is_dir():
            OUT.print(f"{target}: importance of {write_llama_cpp(origin, target)} weights")
        else:
            OUT.print(f"{target}: {read_llama_cpp(origin, target).describe()}")


def fit(
    source: Annotated[str, typer.Option(help="Folder or URI of the checkpoint.")],
    target: Annotated[str, typer.Option(help="238GB, 2.56bpw or '256GB Mac at 32K context'.")],
    output: Annotated[Path, typer.Option(help="Recipe file to write.")],
    recipe: RecipeOption = "dynamic-2.56bpw",
    floor: Annotated[
        list[str] | None, typer.Option(help="Least bits, as attention=4; may be given again.")
    ] = None,
    bands: Annotated[int, typer.Option(min=1, help="Parts that the layers are cut into.")] = 4,
    measure: Annotated[
        str | None,
        typer.Option(
            help="kl (each part in each width) or scaled (in one); default: kl up to 8 GiB."
        ),
    ] = None,
    imatrix: Annotated[str | None, typer.Option(help="Made by `calibrate`.")] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text files to measure on; default: one that ships, of code."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=16, help="At most so many of them in all.")] = 4096,
    context: Annotated[int, typer.Option(min=16, help="Tokens of a sequence.")] = 512,
    workspace: Annotated[
        Path | None,
        typer.Option(
            help="Folder for what is calibrated and measured: name that of a run, or one for fits "
            "to several targets; default: beside the recipe."
        ),
    ] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Choose the bits of each part of a recipe by measurement, within a budget of bytes."""
    with errors_in_one_screen(verbose), stopping_in_order(ERRORS):
        from glm_quant.fit.command import FitSettings, parse_floors, parse_measure
        from glm_quant.fit.command import fit as choose
        from glm_quant.fit.text import fit_tokens

        checkpoint = _open(source)
        settings = FitSettings(
            recipe, parse_floors(floor), bands, parse_measure(measure), imatrix, workspace
        )
        with StageDisplay(ERRORS) as terminal:
            result = choose(
                checkpoint,
                target,
                output,
                settings,
                lambda: fit_tokens(checkpoint, text, tokens, context),
                terminal,
            )
        if as_json:
            print_json(result.model_dump(mode="json"))
        else:
            OUT.print(fit_table(result))


def _open(source: str) -> "Checkpoint":
    """Open a source that is to be streamed.

    Raises:
        InputError: there is none, or it has no weights.
    """
    from glm_quant.checkpoint.reader import Checkpoint
    from glm_quant.hub import open_source

    checkpoint = Checkpoint.open(open_source(source))
    checkpoint.require_weights()
    return checkpoint
