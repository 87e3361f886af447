"""The Metal kernel of `search`, compiled as C++ and run on the CPU.

Only what Metal has and C++ lacks is put in: names of types and functions, and the loop over the
grid. That shows that the algorithm gives the loops' bits; what Apple's compiler and GPUs make of
it, it cannot show. C++14 is what Metal's language is made of.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from glm_quant.codes.search_forms import Form, Problem, Tried
from glm_quant.codes.search_kernel import BODY, header

_SHIM = """
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef FLUSH
#include <xmmintrin.h>
#endif
typedef uint32_t uint;
typedef uint64_t ulong;
#define device
using std::fabs;
using std::max;
using std::min;
using std::rint;
template <typename To, typename From> To as_type(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits are kept");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
inline uint clz(uint x) { return x == 0 ? 32 : __builtin_clz(x); }
namespace precise {
#ifdef RECIPROCAL
inline float divide(float x, float y) { return x * (1.0f / y); }
#else
inline float divide(float x, float y) { return x / y; }
#endif
}
"""

_LOOP = """
extern "C" void run(const float* w, const float* h, const float* state, const float* starts,
                    const float* limit, float* error, float* s, float* b, float* refit_s,
                    float* refit_b, uint8_t* unsure,
                    uint groups, uint STARTS, int SIZE, int LAST, int DROPPED) {
#ifdef FLUSH
    uint before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);  // results and operands
#endif
    struct { uint x, y; } thread_position_in_grid;
    for (thread_position_in_grid.y = 0; thread_position_in_grid.y < groups;
         thread_position_in_grid.y++)
        for (thread_position_in_grid.x = 0; thread_position_in_grid.x < STARTS;
             thread_position_in_grid.x++) {
            %s
        }
#ifdef FLUSH
    _mm_setcsr(before);
#endif
}
"""

EXACT = ("-ffp-contract=off",)


def kernel(folder: Path, flags: Sequence[str] = EXACT) -> Form:
    """Compile the kernel into a folder, and return it as a form; skip where there is no g++."""
    return as_form(compile_kernel(folder, flags))


def compile_kernel(folder: Path, flags: Sequence[str] = EXACT, before: str = "") -> ctypes.CDLL:
    """Compile the kernel, after some C++, to a library in a folder; skip where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine to compile the Metal kernel as C++")
    library = folder / f"kernel{abs(hash(tuple(flags)))}.so"
    command = [compiler, "-std=c++14", "-O2", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    command += [*flags, "-x", "c++", "-", "-o", str(library)]
    source = _SHIM + before + header() + _LOOP % BODY
    subprocess.run(command, input=source, text=True, check=True)
    return ctypes.CDLL(str(library))


def as_form(library: ctypes.CDLL) -> Form:
    """Return a compiled kernel as a form."""
    run = library.run

    def form(problem: Problem) -> Tried:
        groups, size = problem.w.shape
        made = [np.empty((groups, len(problem.starts)), np.float32) for _ in range(5)]
        unsure = np.empty(made[0].shape, np.uint8)
        limit = np.array([problem.limit], np.float32)
        arrays = [*problem[:4], limit, *made, unsure]
        run(
            *(array.ctypes.data_as(ctypes.c_void_p) for array in arrays),
            *(groups, len(problem.starts), size, int(problem.n), problem.dropped),
        )
        return Tried(*made, unsure != 0)

    return form
