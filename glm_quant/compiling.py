"""How a loop is compiled, and where it is kept between runs.

What a reader would get wrong: numba's own cache is not safe between processes. It numbers the files
of a function's variants (signatures, closures) by what its index holds at the moment, so two
processes that compile two variants at once write both to one file, and from then on one variant
runs the other's code: 2-bit packing where 4-bit was meant, without an error. Here a file's name
follows from its content's key, so that no two variants share one.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numba
from numba.core.caching import IndexDataCacheFile

# Values are finite where loops compute, so a minimum needs no care for NaN, and which of -0 and +0
# it gives does not matter. Nothing that changes a rounding is allowed: no "contract", no "arcp".
_RELAXED = {"nnan", "nsz"}


class KeyedCacheFile(IndexDataCacheFile):
    """An index and its data files, each named after the hash of its key and its source's stamp."""

    def save(self, key: Any, data: Any) -> None:
        """Save a variant: its data before the entry that speaks of it."""
        digest = hashlib.sha256(repr((self._source_stamp, key)).encode()).hexdigest()
        name = self._data_name(int(digest[:16], 16))
        self._save_data(name, data)
        self._save_index({**self._load_index(), key: name})


def compile_loop(loop: Callable[..., Any]) -> Any:
    """Return numba's dispatcher of a loop; every operation in it is IEEE 754's."""
    made: Any = numba.njit(nogil=True, fastmath=_RELAXED, error_model="numpy", cache=True)(loop)
    cache: Any = made._cache
    cache._cache_file = KeyedCacheFile(
        cache_path=cache._cache_path,
        filename_base=cache._impl.filename_base,
        source_stamp=cache._impl.locator.get_source_stamp(),
    )
    return made
