"""Running a model class's own `sanitize` on expressions in place of arrays.

mlx-lm's models call `mx.stack`, `mx.split` and so on. While tracing, the name `mx` in their modules
is a stand-in for `mlx.core` whose functions take expressions too; the functions themselves and
everything that they do to real arrays stay MLX's.
"""

import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import mlx.core as mx

from glm_quant.architectures.expressions import Expression, holds_expression, record

# Modules whose `mx` is replaced: mlx-lm's models, and its loader, which unpacks AWQ and GPTQ.
_PREFIXES = ("mlx_lm.models.", "glm_quant.model.glm_moe_dsa")
_LOADER = "mlx_lm.utils"
_NAMESPACES = frozenset({"fast", "fft", "linalg", "random"})
# `sanitize` of some models evaluates what it made, to free memory; there is nothing to free.
_EVALUATIONS = frozenset({"async_eval", "eval"})

# Module globals are replaced, so two threads cannot trace at once.
_lock = threading.RLock()


class _ArrayType(type):
    """`mx.array` as `isinstance`, a constructor and a namespace, with expressions as instances."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, mx.array | Expression)

    def __call__(cls, *arguments: Any, **keywords: Any) -> mx.array:
        return mx.array(*arguments, **keywords)

    def __getattr__(cls, name: str) -> Any:
        return getattr(mx.array, name)


class _Array(metaclass=_ArrayType):
    """Stands for `mx.array`."""


class _TracingModule(ModuleType):
    """Stands for `mlx.core` or one of its namespaces."""

    def __init__(self, module: Any, prefix: str = "") -> None:
        super().__init__("mlx.core")
        self._module = module
        self._prefix = prefix

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if name == "array":
            return _Array
        if name in _NAMESPACES:
            return _TracingModule(value, f"{self._prefix}{name}.")
        if name in _EVALUATIONS:
            return lambda *_arguments, **_keywords: None
        if not callable(value) or isinstance(value, type):
            return value
        return _recording(f"{self._prefix}{name}", value)


def _recording(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that records its call where an argument is an expression."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        if holds_expression(arguments) or holds_expression(keywords):
            return record(name, function, arguments, keywords)
        return function(*arguments, **keywords)

    return call


# `mlx.core`, whose functions take expressions too.
TRACING_MLX = _TracingModule(mx)


@contextmanager
def tracing() -> Generator[None]:
    """Let the modules of mlx-lm's models take expressions while the block runs."""
    with _lock:
        replaced: list[tuple[ModuleType, str]] = []
        for name, module in list(sys.modules.items()):
            if name.startswith(_PREFIXES) or name == _LOADER:
                replaced += [(module, key) for key, value in vars(module).items() if value is mx]
        try:
            for module, key in replaced:
                setattr(module, key, TRACING_MLX)
            yield
        finally:
            for module, key in replaced:
                setattr(module, key, mx)
