"""What is held against a float32 reference is computed in float32."""

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from glm_quant.model.precision import require_float32


def python(code: str, switch: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MLX_ENABLE_TF32": switch},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_products_are_as_exact_as_numpy() -> None:
    """A product of float32 matrices has a float32 product's error, whatever the machine has."""
    require_float32()
    a, b = np.random.default_rng(0).standard_normal((2, 512, 512)).astype(np.float32)
    exact = a.astype(np.float64) @ b
    error = np.array(mx.array(a) @ mx.array(b)) - exact
    assert np.linalg.norm(error) < 2e-6 * np.linalg.norm(exact)


def test_measuring_keeps_the_users_switch() -> None:
    """What measures a build runs as the user has it, though the proof beside it is exact."""
    code = (
        "import os\n"
        "from glm_quant.model.precision import require_float32, users_environment\n"
        "require_float32()\n"
        "print(os.environ['MLX_ENABLE_TF32'], users_environment()['MLX_ENABLE_TF32'])"
    )
    assert python(code, "1").split() == ["0", "1"]


@pytest.mark.skipif(mx.default_device() != mx.gpu, reason="needs a GPU with matrix units")
def test_a_settled_short_mantissa_is_refused() -> None:
    """Where an earlier product has settled on the short mantissa, the proof does not start."""
    code = (
        "import mlx.core as mx\n"
        "from glm_quant.errors import RunError\n"
        "from glm_quant.model.precision import require_float32\n"
        "x = mx.full((512, 512), 1 + 2.0**-20)\n"
        "exact = mx.array_equal(x @ mx.eye(512), x).item()\n"
        "try:\n"
        "    require_float32()\n"
        "    print(exact, 'went on')\n"
        "except RunError as error:\n"
        "    print(exact, error)"
    )
    said = python(code, "1")
    assert said.startswith("True went on") or "MLX_ENABLE_TF32=0" in said, said
