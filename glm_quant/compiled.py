"""Loops that are compiled when they are first called.

Importing numba takes a second, which commands that compute nothing need not wait for.
"""

import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

_importing = threading.RLock()


class Compiled:
    """A loop, compiled and kept (`glm_quant.compiling`) at its first call."""

    def __init__(self, loop: Callable[..., Any]) -> None:
        self._loop: Any = loop

    @cached_property
    def dispatcher(self) -> Any:
        """Numba's form of it; loops that it calls get theirs first, since numba looks for them."""
        with _importing:
            from glm_quant.compiling import compile_loop

            names = self._loop.__globals__
            for name in self._loop.__code__.co_names:
                if isinstance(called := names.get(name), Compiled):
                    names[name] = called.dispatcher
            return compile_loop(self._loop)

    def __call__(self, *arguments: Any) -> Any:
        """Run it."""
        return self.dispatcher(*arguments)


def compiled(loop: Callable[..., Any]) -> Any:
    """Compile a loop when it is first called, and keep it.

    A loop may call others of its own file only, by their names there: it is compiled again when
    that file changes.
    """
    return Compiled(loop)
