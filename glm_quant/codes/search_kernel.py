"""`search`'s starts as a kernel for Apple's GPUs: one thread for each start of each group.

What a reader would get wrong: nothing here was ever run on a GPU. The kernel's text,
`search_kernel.metal`, is compiled as C++ by the tests and held bit for bit against the compiled
loops; on a Mac it is used only after it gave the loops' bytes there (`search_device`).
"""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.resources import files
from typing import Any

import mlx.core as mx
import numpy as np

from glm_quant.codes import search_loops
from glm_quant.codes.search_forms import Problem, Tried, thread_stream
from glm_quant.codes.search_loops import DECIDED, DROPPED_BY_F16, STATE, STEPS

_INPUTS = ("w", "h", "state", "starts", "limit")
_OUTPUTS = ("error", "s", "b", "refit_s", "refit_b", "unsure")
_THREADS = 256

BODY = f"""
    uint start = thread_position_in_grid.x, group = thread_position_in_grid.y;
    glm_quant::Solution found = glm_quant::searched(
        w + group * SIZE, h + group * SIZE, state + group * {len(STATE)},
        starts[2 * start], starts[2 * start + 1], limit[0], SIZE, (float)LAST, DROPPED);
    uint place = group * STARTS + start;
    error[place] = found.error;
    s[place] = found.s;
    b[place] = found.b;
    refit_s[place] = found.refit_s;
    refit_b[place] = found.refit_b;
    unsure[place] = found.unsure ? 1 : 0;
"""


def header() -> str:
    """Return the kernel's functions, after the constants that they share with the loops."""
    digits, power = math.frexp(DECIDED)
    constants = {
        "STEPS": STEPS,
        "DROPPED_BY_F16": DROPPED_BY_F16,
        "DECIDED_DIGITS": f"{int(digits * 2**53)}ul",
        "DECIDED_POWER": power - 53,
        **{name: f"{getattr(search_loops, name)!r}f" for name in ("SMALL", "LARGE", "TINY")},
    }
    lines = [f"#define {name} {value}" for name, value in constants.items()]
    text = files("glm_quant.quantize").joinpath("search_kernel.metal").read_text(encoding="utf-8")
    return "\n".join([*lines, text])


@cache
def _kernel() -> Any:
    return mx.fast.metal_kernel(
        name="glm_quant_search",
        input_names=_INPUTS,
        output_names=_OUTPUTS,
        source=BODY,
        header=header(),
        compile_options={"math_mode": "safe"},
    )


def try_on_metal(problem: Problem) -> Tried:
    """Try all starts on the GPU; a `search_forms.Form`.

    Raises:
        RuntimeError: there is no Metal, or its compiler refuses the kernel.
        ValueError: there is no GPU.
    """
    return _callers().submit(_try, problem).result()


@cache
def _callers() -> ThreadPoolExecutor:
    """Two threads that speak to the GPU, however many encode: one copies while one waits.

    Each has a stream of its own, and Metal has few queues.
    """
    return ThreadPoolExecutor(2, "search-on-metal")


def _try(problem: Problem) -> Tried:
    groups, size = problem.w.shape
    starts = len(problem.starts)
    with mx.stream(thread_stream(mx.Device(mx.gpu))):
        made = _kernel()(
            inputs=[
                *(mx.array(a) for a in (problem.w, problem.h, problem.state, problem.starts)),
                mx.array([float(problem.limit)]),
            ],
            template=[
                ("SIZE", size),
                ("STARTS", starts),
                ("LAST", int(problem.n)),
                ("DROPPED", problem.dropped),
            ],
            grid=(starts, groups, 1),
            threadgroup=(starts, min(groups, _THREADS // starts), 1),
            output_shapes=[(groups, starts)] * len(_OUTPUTS),
            output_dtypes=[mx.float32] * (len(_OUTPUTS) - 1) + [mx.uint8],
        )
        mx.eval(made)
    error, s, b, refit_s, refit_b, unsure = (np.array(array) for array in made)
    return Tried(error, s, b, refit_s, refit_b, unsure != 0)
