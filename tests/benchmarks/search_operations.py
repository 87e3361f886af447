"""How many operations the Metal kernel of `search` needs: its text, run with numbers that count."""

import ctypes
from pathlib import Path
from typing import NamedTuple

from glm_quant.codes.search_forms import Form
from tests.metal_as_cpp import EXACT, as_form, compile_kernel

_COUNTING = """
static uint64_t counts[3];
#define OPERATION(TYPE, SYMBOL, KIND) \\
    friend TYPE operator SYMBOL(TYPE x, TYPE y) { counts[KIND]++; return x.v SYMBOL y.v; }
#define COMPARISON(TYPE, SYMBOL, KIND) \\
    friend bool operator SYMBOL(TYPE x, TYPE y) { counts[KIND]++; return x.v SYMBOL y.v; }
#define COMPARISONS(TYPE, KIND) \\
    COMPARISON(TYPE, ==, KIND) COMPARISON(TYPE, !=, KIND) COMPARISON(TYPE, <, KIND) \\
    COMPARISON(TYPE, >, KIND) COMPARISON(TYPE, <=, KIND) COMPARISON(TYPE, >=, KIND)
struct Real {
    float v;
    Real() = default;
    template <typename T> Real(T x) : v((float)x) {}
    explicit operator uint() const { return (uint)v; }
    OPERATION(Real, +, 0) OPERATION(Real, -, 0) OPERATION(Real, *, 0) OPERATION(Real, /, 1)
    COMPARISONS(Real, 0)
    Real& operator+=(Real x) { return *this = *this + x; }
    Real operator-() const { return -v; }
};
struct Long {
    uint64_t v;
    Long() = default;
    template <typename T> Long(T x) : v((uint64_t)x) {}
    explicit operator uint() const { return (uint)v; }
    OPERATION(Long, +, 2) OPERATION(Long, -, 2) OPERATION(Long, *, 2)
    OPERATION(Long, &, 2) OPERATION(Long, |, 2) OPERATION(Long, <<, 2) OPERATION(Long, >>, 2)
    COMPARISONS(Long, 2)
    Long& operator+=(Long x) { return *this = *this + x; }
    Long& operator-=(Long x) { return *this = *this - x; }
    Long& operator<<=(int x) { return *this = *this << x; }
    Long& operator>>=(int x) { return *this = *this >> x; }
};
inline Real fabs(Real x) { counts[0]++; return std::fabs(x.v); }
inline Real rint(Real x) { counts[0]++; return std::rint(x.v); }
inline Real min(Real x, Real y) { counts[0]++; return std::min(x.v, y.v); }
inline Real max(Real x, Real y) { counts[0]++; return std::max(x.v, y.v); }
namespace precise {
inline Real divide(Real x, Real y) { return x / y; }
}
extern "C" uint64_t count(int kind) { return counts[kind]; }
#define float Real
#define ulong Long
"""


class Operations(NamedTuple):
    """What was counted: float32 operations other than divisions, these, and 64-bit integer ones."""

    simple: int
    divisions: int
    long: int


class Counter:
    """The kernel, and what it has done so far."""

    def __init__(self, folder: Path) -> None:
        """Compile it into a folder."""
        self._library = compile_kernel(folder, EXACT, _COUNTING)
        self._library.count.restype = ctypes.c_uint64
        self.form: Form = as_form(self._library)

    def operations(self) -> Operations:
        """Return what its calls have counted."""
        return Operations(*(self._library.count(kind) for kind in range(3)))
