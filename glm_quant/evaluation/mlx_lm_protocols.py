"""Perplexity by `mlx_lm.perplexity`: its own functions, called as its command calls them.

So the number is the one that the command prints. Its standard error
takes neighbouring tokens for independent; for a comparison use the sequences' own losses.
"""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import perplexity as peer
from mlx_lm.tuner.datasets import create_dataset

from glm_quant.artifact import sha256_file
from glm_quant.errors import EvaluationError
from glm_quant.evaluation.data_files import data_file
from glm_quant.evaluation.peer_records import PeerPerplexity
from glm_quant.settings import PeerPerplexitySettings, TextDatasetSettings


def measure_peer_perplexity(
    model: Any,
    tokenizer: Any,
    settings: PeerPerplexitySettings,
    progress: Callable[[int], None] | None = None,
) -> PeerPerplexity:
    """Do what `mlx_lm.perplexity` does, with a model that is loaded.

    Args:
        model: a model of mlx-lm.
        tokenizer: its tokenizer.
        settings: the command's options.
        progress: called with the number of tokens done since the last call.

    Raises:
        EvaluationError: the dataset is too short or cannot be read.
    """
    np.random.seed(settings.seed)  # the peer draws from numpy's global generator
    mx.random.seed(settings.seed)
    data = load_sequences(tokenizer, settings)
    noted = _Noting(model, data, progress)
    value, error = peer.eval_ppl(noted, data, batch_size=settings.batch_size)
    file = None if settings.file is None else data_file(settings.file)
    return PeerPerplexity(
        dataset=settings.data_path if file is None else file.name,
        dataset_sha256=None if file is None else sha256_file(file),
        sequence_length=settings.sequence_length,
        samples=len(data),
        seed=settings.seed,
        batch_size=settings.batch_size,
        value=value,
        standard_error=cast("float", error),
        sequence_nll=noted.losses,
        method=(
            f"mlx_lm.perplexity: {len(data)} sequences of {settings.sequence_length:,} tokens, "
            f"seed {settings.seed}; the standard error takes tokens for independent, as the "
            "command does"
        ),
    )


def load_sequences(tokenizer: Any, settings: PeerPerplexitySettings) -> mx.array:
    """Return the command's sequences of token ids, [samples, sequence_length].

    Raises:
        EvaluationError: the dataset is too short or cannot be read.
    """
    where = settings.file or settings.data_path
    try:
        with _local_rows(tokenizer, settings.file):
            return peer.load_data(
                tokenizer, settings.data_path, settings.num_samples, settings.sequence_length
            )
    except IndexError:
        token_count = settings.num_samples * settings.sequence_length
        raise EvaluationError(
            f"{where}: the dataset is shorter than the {token_count:,} tokens that "
            f"{settings.num_samples} sequences of {settings.sequence_length:,} take. Lower "
            "num_samples or sequence_length."
        ) from None
    except (OSError, ValueError) as error:  # datasets' own errors are of these two
        raise EvaluationError(
            f"{where}: the dataset of peer_perplexity cannot be read ({error}). Without a network, "
            "name a file of JSON lines in its schema as peer_perplexity.file."
        ) from error


def load_text(settings: TextDatasetSettings) -> str:
    """Return a text of the Hub: its rows with an empty line between them.

    Raises:
        EvaluationError: it cannot be read.
    """
    from datasets import load_dataset

    try:
        rows: Any = load_dataset(settings.path, settings.config, split=settings.split)
        return "\n\n".join(rows[settings.column])
    except (OSError, ValueError, KeyError) as error:  # datasets' own errors are of these
        raise EvaluationError(
            f"{settings.path}: the text of perplexity_datasets cannot be read ({error}). Without a "
            "network, name a text file in perplexity_texts."
        ) from error


@contextmanager
def replaced(module: ModuleType, name: str, value: Any) -> Generator[None]:
    """Let a peer's module use something of ours under one of its names for a while."""
    old = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, old)


@contextmanager
def _local_rows(tokenizer: Any, file: str | None) -> Generator[None]:
    if file is None:
        yield
        return
    lines = data_file(file).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    if not rows:
        raise ValueError("it is empty")
    local = create_dataset(rows, tokenizer, SimpleNamespace())
    with replaced(peer, "load_dataset", lambda _args, _tokenizer: (local, [], [])):
        yield


class _Noting:
    """A model that notes the mean loss of each sequence as the peer passes them through."""

    def __init__(self, model: Any, data: mx.array, progress: Callable[[int], None] | None) -> None:
        self.losses: list[float] = []
        self._model = model
        self._data = data
        self._progress = progress

    def __call__(self, ids: mx.array) -> mx.array:
        logits = self._model(ids)
        first = len(self.losses)
        targets = self._data[first : first + len(ids), 1:]
        losses = nn.losses.cross_entropy(logits.astype(mx.float32), targets, reduction="none")
        self.losses += cast("list[float]", losses.mean(axis=1).tolist())
        if self._progress:
            self._progress(ids.size)
        return logits
