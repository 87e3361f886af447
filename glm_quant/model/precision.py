"""What is held against a float32 reference is computed in float32.

MLX multiplies float32 matrices with 10 bits of mantissa where the machine has matrix units (Apple's
M5 and newer, NVIDIA since Ampere), unless MLX_ENABLE_TF32 is 0. It reads the variable once, at the
first product of a process. An error of 1e-3 hides nothing in generated text, but it is fifty times
the bound under which the runtime is called equal to the reference.
"""

import os
from functools import cache

from glm_quant.errors import RunError

_SWITCH = "MLX_ENABLE_TF32"
# As the user has it: what measures a build's own speed runs with that.
_BEFORE = os.environ.get(_SWITCH)
# Matrix units are only used for products of some size.
_SIZE = 512


@cache
def require_float32() -> None:
    """Make MLX's float32 products exact to float32 in this process.

    Raises:
        RunError: they are not, since an earlier product of this process has settled it.
    """
    import mlx.core as mx  # here, since asking for the environment needs none of it

    os.environ[_SWITCH] = "0"
    if mx.default_device() != mx.gpu:
        return
    fine = mx.full((_SIZE, _SIZE), 1 + 2.0**-20, mx.float32)  # 1 in any shorter mantissa
    if not mx.array_equal(fine @ mx.eye(_SIZE), fine):
        raise RunError(
            f"MLX multiplies float32 matrices with a shorter mantissa on {mx.default_device()}, so "
            f"nothing can be held against a float32 reference. Start again with {_SWITCH}=0."
        )


def users_environment() -> dict[str, str]:
    """Return the environment for a process that measures a build as its users will run it."""
    kept = {name: value for name, value in os.environ.items() if name != _SWITCH}
    return kept | ({} if _BEFORE is None else {_SWITCH: _BEFORE})
