"""Sums of squared inputs, gathered while the layers of a source compute.

Linear layers are wrapped by listeners. Two weights are not met as they are stored: `kv_b_proj`
becomes `embed_q`, whose columns meet the part of each head's query that has no position, and
`unembed_out`, whose columns meet the latent; both are taken where they are made.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


# The widest input whose covariance is kept: 268 MB as float32, and inverting it takes minutes.
WIDEST_GRAM = 8192

_SAME_INPUT = (("up_proj", "gate_proj"), ("kv_a_proj_with_mqa", "q_a_proj"))


def input_name(path: str) -> str:
    """Return the weight whose input a weight shares, itself mostly."""
    for name, shared_name in _SAME_INPUT:
        if path.endswith(f".{name}"):
            return path.removesuffix(name) + shared_name
    return path


class Sums:
    """Σx² [units, width] and the number of tokens [units] of one weight's input.

    Attributes:
        gram: Σx xᵀ over the tokens of all units, [width, width], where it is wanted.
    """

    def __init__(self, units: int, width: int, *, gram: bool = False) -> None:
        """Begin at nothing."""
        self.gram: NDArray[np.float64] | None = np.zeros((width, width)) if gram else None
        self.squares: NDArray[np.float64] = np.zeros((units, width), np.float64)
        self.counts: NDArray[np.int64] = np.zeros(units, np.int64)

    def add(self, unit: int, x: NDArray[np.float32]) -> None:
        """Add tokens [tokens, width] that a unit met."""
        self.squares[unit] += np.square(x, dtype=np.float64).sum(axis=0)
        self.counts[unit] += len(x)
        if self.gram is not None:
            self.gram += x.T @ x


class Listener(nn.Module):
    """Stands in for a module, and shows what goes in or comes out."""

    def __init__(self, module: Any, show: Callable[[Floats], None]) -> None:
        """Show the input of a module."""
        super().__init__()
        self.module = module
        self._show = show
        self._show_output: Callable[[Floats], None] | None = None

    def showing_output(self, show: Callable[[Floats], None]) -> "Listener":
        """Show the output too."""
        self._show_output = show
        return self

    def __call__(self, x: mx.array) -> mx.array:
        """Compute what the module computes."""
        self._show(np.array(x))
        y = self.module(x)
        if self._show_output is not None:
            self._show_output(np.array(y))
        return y


class Observer:
    """Gathers the sums of what passes the layers, by MLX module path."""

    def __init__(self, experts: int, *, grams: bool = False) -> None:
        """Remember how many routed experts a layer has, and whether covariances are wanted."""
        self._experts = experts
        self._grams = grams
        self._replaced: list[tuple[Any, str, Any]] = []
        self.sums: dict[str, Sums] = {}

    def attach(self, layer: Any, index: int) -> None:
        """Put listeners into a loaded layer."""
        path = f"model.layers.{index}"
        self._listen_to_attention(layer.self_attn, f"{path}.self_attn")
        if "gate" not in layer.mlp:
            self._listen_to_mlp(layer.mlp, f"{path}.mlp")
        elif "shared_experts" in layer.mlp:
            self._listen_to_mlp(layer.mlp.shared_experts, f"{path}.mlp.shared_experts")

    def detach(self) -> None:
        """Take the listeners out again."""
        for parent, name, module in reversed(self._replaced):
            setattr(parent, name, module)
        self._replaced.clear()

    def on_expert(self, index: int, expert: int, x: mx.array, middle: mx.array) -> None:
        """Add what an expert's tokens brought: its input, and what its down projection met."""
        path = f"model.layers.{index}.mlp.switch_mlp"
        for name, inputs in (("gate_proj", x), ("down_proj", middle)):
            values = np.array(inputs)
            self._of(f"{path}.{name}", self._experts, values.shape[-1]).add(expert, values)
        self.sums[f"{path}.up_proj"] = self.sums[f"{path}.gate_proj"]  # they share the input

    def _listen_to_attention(self, attention: Any, path: str) -> None:
        for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"):
            self._listen(attention, name, path)
        heads, nope = attention.num_heads, attention.nope_dim

        def queries(y: Floats) -> None:
            per_head = y.reshape(-1, heads, y.shape[-1] // heads)[..., :nope]
            for head in range(heads):
                self._of(f"{path}.embed_q", heads, nope).add(head, per_head[:, head])

        def latents(y: Floats) -> None:
            self._add(f"{path}.unembed_out", y)

        attention.q_b_proj.showing_output(queries)
        norm = Listener(attention.kv_a_layernorm, lambda _: None).showing_output(latents)
        self._replace(attention, "kv_a_layernorm", norm)

    def _listen_to_mlp(self, mlp: Any, path: str) -> None:
        for name in ("gate_proj", "up_proj", "down_proj"):
            self._listen(mlp, name, path)

    def _listen(self, module: Any, name: str, path: str) -> None:
        listener = Listener(module[name], lambda x: self._add(f"{path}.{name}", x))
        self._replace(module, name, listener)

    def _replace(self, parent: Any, name: str, listener: Listener) -> None:
        self._replaced.append((parent, name, parent[name]))
        setattr(parent, name, listener)

    def _add(self, path: str, x: Floats) -> None:
        self._of(path, 1, x.shape[-1]).add(0, x.reshape(-1, x.shape[-1]))

    def _of(self, path: str, units: int, width: int) -> Sums:
        if path not in self.sums:
            # Heads have inputs of their own, so that a sum over them says little.
            gram = self._grams and width <= WIDEST_GRAM and not path.endswith(".embed_q")
            self.sums[path] = Sums(units, width, gram=gram and input_name(path) == path)
        return self.sums[path]
