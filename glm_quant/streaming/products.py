"""Matrix products in float32: MLX's on a GPU, numpy's on a CPU.

MLX's Linux wheels bring the reference BLAS, at 2 to 3 GFLOP/s on two cores where numpy's OpenBLAS
has 170. The values are the same up to the order of summation.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map


def product(x: mx.array, weight: mx.array) -> mx.array:
    """Return x [..., in] times the transpose of a weight [..., out, in]."""
    if mx.default_device() == mx.gpu:
        return x @ weight.swapaxes(-1, -2)
    return mx.array(np.asarray(x) @ np.asarray(weight).swapaxes(-1, -2))


def with_products(module: Any) -> Any:
    """Let the linear layers of a loaded float32 module use `product`; returns the module."""
    if mx.default_device() == mx.gpu:
        return module
    leaves = tree_map(_exchange, module.leaf_modules(), is_leaf=nn.Module.is_module)
    module.update_modules(leaves)
    return module


def _exchange(leaf: Any) -> Any:
    from mlx_lm.models.mla import MultiLinear  # here, since mlx-lm brings seconds of transformers

    better = {nn.Linear: _Linear, MultiLinear: _MultiLinear}.get(type(leaf))
    if better is None:
        return leaf
    replacement = better.__new__(better)
    nn.Module.__init__(replacement)
    dict.update(replacement, leaf)  # a module is a dict of its parameters
    return replacement


class _Linear(nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        y = product(x, self.weight)
        return y + self.bias if "bias" in self else y


class _MultiLinear(nn.Module):
    """In place of mlx-lm's: one matrix a head, [heads, out, in]."""

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        weight = self["weight"]
        return product(x, weight if transpose else weight.swapaxes(-1, -2))
