"""What `fit` measures on: files that are named, or a text that ships and that nothing else reads.

`texts/code.txt` holds modules of this project as they stood in version 0.1, under its licence. It
stays as it is when they change: costs are kept by the sha256 of the tokens.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from glm_quant.calibration.texts import named_texts
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.evaluation.token_set import TokenSet, make_token_set, read_files
from glm_quant.settings import TokenSettings


def fit_texts(paths: Sequence[Path] | None) -> dict[str, str]:
    """Return texts by the name of their slice.

    Raises:
        RecipeError: a text cannot be read.
    """
    named = named_texts(paths)
    if named is not None:
        return read_files(named, "--text")
    shipped = files("glm_quant.fit").joinpath("texts", "code.txt")
    return {"code": shipped.read_text(encoding="utf-8")}


def fit_tokens(
    source: Checkpoint, paths: Sequence[Path] | None, tokens: int, context: int
) -> TokenSet:
    """Cut texts into sequences, spread evenly over them.

    Args:
        source: whose tokenizer.
        paths: text files; default: the text that ships.
        tokens: at most so many of all texts together.
        context: tokens of a sequence.

    Raises:
        RecipeError: a text cannot be read, or is empty.
    """
    settings = TokenSettings(tokens=max(tokens, context), context=context)
    whole = make_token_set(source, settings, fit_texts(paths))
    return whole.spread(max(tokens // context, 1))
