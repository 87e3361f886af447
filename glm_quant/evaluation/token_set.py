"""The fixed tokens that source and build are compared on: slices of texts, cut into sequences.

The texts are the built-in ones or the recipe's files. A text is cut into windows of
`divergence.context` tokens, of which the seed picks as many as `divergence.tokens` wants; a text
that is too short gives what it has. A source without a tokenizer gets seeded token ids, on which
the numbers say little of any language.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.data import held_out_text
from glm_quant.errors import RecipeError
from glm_quant.evaluation.divergence_record import SliceFacts
from glm_quant.evaluation.perplexity import digest_text
from glm_quant.quantize.assemble import COMPANIONS
from glm_quant.settings import BUILT_IN_SLICES, TokenSettings

_CHATS = TypeAdapter(list[list[dict[str, str]]])


@dataclass(frozen=True)
class TokenSlice:
    """Some sequences of one kind of text."""

    name: str
    text_sha256: str
    sequences: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class TokenSet:
    """All slices."""

    slices: tuple[TokenSlice, ...]

    @property
    def sequences(self) -> list[NDArray[np.int64]]:
        """Every sequence, slice by slice."""
        return [sequence for part in self.slices for sequence in part.sequences]

    @property
    def names(self) -> list[str]:
        """The slice of every sequence."""
        return [part.name for part in self.slices for _ in part.sequences]

    @property
    def sha256(self) -> str:
        """Digest of all token ids and where sequences end."""
        ids = [sequence.tolist() for sequence in self.sequences]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()

    def spread(self, count: int) -> "TokenSet":
        """Return at most so many of the sequences, at even steps."""
        pairs = [(part, sequence) for part in self.slices for sequence in part.sequences]
        numbers = np.unique(np.linspace(0, len(pairs) - 1, min(count, len(pairs))).astype(int))
        kept: dict[str, TokenSlice] = {}
        for part, sequence in (pairs[int(number)] for number in numbers):
            before = kept[part.name].sequences if part.name in kept else ()
            kept[part.name] = replace(part, sequences=(*before, sequence))
        return TokenSet(tuple(kept.values()))

    def facts(self) -> list[SliceFacts]:
        """Return what a record says of the slices."""
        return [
            SliceFacts(
                name=part.name,
                text_sha256=part.text_sha256,
                lengths=[len(sequence) for sequence in part.sequences],
            )
            for part in self.slices
        ]


def make_token_set(
    source: Checkpoint, settings: TokenSettings, texts: Mapping[str, str] | None = None
) -> TokenSet:
    """Cut texts with the source's own tokenizer.

    Args:
        source: whose tokenizer.
        settings: how many tokens.
        texts: of each slice; default: the recipe's, or those built in for evaluation.

    Raises:
        RecipeError: a text cannot be read, or is empty.
    """
    texts = read_texts(settings) if texts is None else texts
    if "tokenizer.json" not in source.files:
        rng = np.random.default_rng(settings.seed)
        ids = rng.integers(0, int(source.config["vocab_size"]), settings.tokens)
        return TokenSet((_cut("seeded", digest_text(""), ids, settings),))
    tokenizer = load_tokenizer(source)
    slices: list[TokenSlice] = []
    for name, text in texts.items():
        ids = np.array(_encode(tokenizer, text), np.int64)
        if len(ids) < 2:
            raise RecipeError(f"The text of slice {name} has {len(ids)} tokens; give a longer one.")
        slices.append(_cut(name, digest_text(text), ids, settings))
    return TokenSet(tuple(slices))


def read_texts(settings: TokenSettings) -> Mapping[str, str]:
    """Return the text of each slice that is evaluated.

    Raises:
        RecipeError: a file cannot be read.
    """
    if settings.texts is None:
        return {name: _built_in(name) for name in BUILT_IN_SLICES}
    return read_files(settings.texts, "divergence.texts")


def read_files(texts: Mapping[str, str], place: str) -> dict[str, str]:
    """Return the texts of some files by their names.

    Args:
        texts: path of each.
        place: where the recipe names them.

    Raises:
        RecipeError: a file cannot be read.
    """
    found: dict[str, str] = {}
    for name, file in texts.items():
        path = Path(file).expanduser()
        try:
            found[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"{path}: the text of {place}.{name} cannot be read ({error})."
            ) from None
    return found


def load_tokenizer(source: Checkpoint) -> Any:
    """Return the source's tokenizer, wherever the source is."""
    from mlx_lm.utils import load_tokenizer as load

    with TemporaryDirectory(prefix="glm-quant-tokenizer-") as name:
        folder = Path(name)
        for file in ("config.json", *COMPANIONS):
            if file in source.files:
                (folder / file).write_bytes(source.source.read(file))
        return load(folder)


def _built_in(name: str) -> str:
    if name == "code":
        return held_out_text()
    ending = "json" if name == "chat" else "txt"
    return (
        files("glm_quant.evaluation")
        .joinpath("texts", f"{name}.{ending}")
        .read_text(encoding="utf-8")
    )


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, however long: it is cut into sequences later."""
    # transformers would warn that it is longer than the model's context.
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Return token ids; a JSON list of conversations goes through the chat template."""
    conversations = conversations_of(text)
    if conversations is None:
        return encode_text(tokenizer, text)
    if not getattr(tokenizer, "has_chat_template", False):
        plain = "\n".join(turn["content"] for turns in conversations for turn in turns)
        return encode_text(tokenizer, plain)
    return [
        token
        for turns in conversations
        for token in tokenizer.apply_chat_template(turns, tokenize=True)
    ]


def conversations_of(text: str) -> list[list[dict[str, str]]] | None:
    """Return a text's conversations if it is JSON of that form, else None: it is plain text."""
    try:
        return _CHATS.validate_json(text)
    except ValidationError:
        return None


def _cut(
    name: str, text_sha256: str, ids: NDArray[np.int64], settings: TokenSettings
) -> TokenSlice:
    """Return windows in the text's order, at most `settings.tokens` tokens in all."""
    starts = np.arange(0, max(len(ids) - 1, 1), settings.context)
    wanted = max(settings.tokens // settings.context, 1)
    if len(starts) > wanted:
        whole = starts[starts + settings.context <= len(ids)]
        rng = np.random.default_rng(settings.seed)
        starts = np.sort(rng.choice(whole, min(wanted, len(whole)), replace=False))
    windows = [ids[start : start + settings.context] for start in starts]
    return TokenSlice(name, text_sha256, tuple(window for window in windows if len(window) > 1))
