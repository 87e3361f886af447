"""What a caller may attach to a streamed pass: hooks for layers and batches, and model variants."""

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from glm_quant.streaming.weights import Floats

Tokens = NDArray[np.int64]


class LayerHooks:
    """Called before and after each layer of a pass, whichever batches go through it.

    The base class does nothing. Calibration fetches a layer's shards before it, and makes the
    layer's importance and Hessians after it.
    """

    def before_layer(self, index: int) -> None:
        """Prepare for a layer whose weights are about to be read."""

    def after_layer(self, index: int) -> None:
        """Finish a layer that all batches have passed, in this call or before an interruption.

        The hidden states before the layer are kept until this returns for the first time.
        """


class BatchHooks(Protocol):
    """Called with what one batch computes in each layer, in the order of computation."""

    def attach(self, layer: Any, index: int) -> None:
        """Put listeners into a layer that a wave of the batch is about to pass."""
        ...

    def detach(self) -> None:
        """Take the listeners out again, since other batches pass the same layer."""
        ...

    def on_expert(self, index: int, expert: int, x: mx.array, middle: mx.array) -> None:
        """Record an expert's inputs.

        Args:
            index: number of the layer.
            expert: number of the expert in it.
            x: input of its gate and up projections, [tokens, hidden_size].
            middle: input of its down projection, [tokens, moe_intermediate_size].
        """
        ...

    def after_wave(self, index: int, wave: int) -> None:
        """Keep what was recorded of a wave; its states are kept after this returns."""
        ...


class Variant(Protocol):
    """A model of which some weights differ from those that are read for all batches."""

    def embed(self, tokens: Tokens) -> Floats:
        """Return embeddings of token ids, [L, hidden_size]."""
        ...

    def norm(self) -> Any:
        """Return the norm after the last layer."""
        ...

    def variant_layer(self, index: int, layer: Any) -> Any:
        """Return the variant's layer; the shared one where they do not differ."""
        ...

    def variant_expert(
        self, layer: int, expert: int, matrices: Sequence[mx.array]
    ) -> list[mx.array]:
        """Return [gate, up, down] of the variant's expert, given the shared ones."""
        ...
