"""Who takes part in a streamed pass besides the tokens: hosts, watchers, and models that differ."""

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from glm_quant.streaming.weights import Floats

Tokens = NDArray[np.int64]


class Host:
    """Whoever brings the layers' weights near, and has more to do with them; this one has not."""

    def enter(self, index: int) -> None:
        """Note that a layer is about to be passed."""

    def leave(self, index: int) -> None:
        """Note that all parties have passed a layer, now or before an interruption.

        The states before it are there until this returns for the first time.
        """


class Watching(Protocol):
    """Whoever wants to see what passes through the layers; calls come in the order of compute."""

    def watch(self, layer: Any, index: int) -> None:
        """Note that a wave is about to pass a layer; may put listeners into it."""
        ...

    def leave(self) -> None:
        """Take the listeners out again: others pass the same layer."""
        ...

    def routed(self, index: int, expert: int, x: mx.array, middle: mx.array) -> None:
        """Note an expert's tokens [tokens, hidden_size] and what its down projection meets."""
        ...

    def passed(self, index: int, wave: int) -> None:
        """Note that a wave has passed a layer; its states are kept after this returns."""
        ...


class Variant(Protocol):
    """A model that differs here and there from the one whose weights are read for all."""

    def embed(self, tokens: Tokens) -> Floats:
        """Return embeddings of token ids, [L, hidden_size]."""
        ...

    def norm(self) -> Any:
        """Return the norm after the last layer."""
        ...

    def own_layer(self, index: int, layer: Any) -> Any:
        """Return its layer in place of the one that was read; the same where they do not differ."""
        ...

    def own_expert(self, layer: int, expert: int, matrices: Sequence[mx.array]) -> list[mx.array]:
        """Return [gate, up, down] of its expert, likewise."""
        ...
