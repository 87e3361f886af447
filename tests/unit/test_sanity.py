"""No weight of a release is all zero or a copy of another, and its codes stay near it."""

import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from flows.cli.main import app
from glm_quant.codes.encode import Rows, encode
from glm_quant.codes.fidelity import measure
from glm_quant.codes.scheme import Quantized
from glm_quant.errors import WeightError
from glm_quant.recipe import Recipe
from tests.conftest import Edit, Made
from tests.plain import PLAIN

SCHEMES = [Quantized("affine", bits, 64) for bits in (2, 3, 4, 5, 6, 8)]
SCHEMES += [Quantized("mxfp4", 4, 32), Quantized("nvfp4", 4, 16), Quantized("mxfp8", 8, 32)]


def normal(rows: int, seed: int = 0) -> np.ndarray:
    """Normal weights as the bits of bfloat16."""
    values = np.random.default_rng(seed).normal(0, 0.02, (rows, 256)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.describe())
def test_error_is_that_of_what_a_runtime_reads(scheme: Quantized) -> None:
    """The measured error is that of mx.dequantize on the stored bytes, for every scheme."""
    weights = normal(64)
    stored = encode(Rows(weights, "BF16"), scheme, "")
    found = measure(weights, "BF16", scheme, stored)
    arrays = [mx.array(a.reshape(64, -1)) for a in stored]
    if scheme.mode == "affine":
        arrays[1:] = [a.view(mx.bfloat16).astype(mx.float32) for a in arrays[1:]]
    given = mx.array(weights).view(mx.bfloat16).astype(mx.float32)
    with mx.stream(mx.cpu):
        read = mx.dequantize(
            *arrays, group_size=scheme.group_size, bits=scheme.bits, mode=scheme.mode,
            **({} if scheme.mode == "affine" else {"dtype": mx.float32}),
        )  # fmt: skip
        error = mx.sqrt(mx.sum((read - given) ** 2) / mx.sum(given**2)).item()
    assert found.relative_error == pytest.approx(error, rel=1e-4)
    assert found.count == weights.size
    if scheme.mode == "affine":
        assert sum(found.histogram) == weights.size
    found.check(scheme, "")


def test_codes_of_something_else_are_refused() -> None:
    """Codes of other rows have the right histogram and are nowhere near the weights."""
    scheme = Quantized("affine", 4, 64)
    stored = encode(Rows(normal(64), "BF16"), scheme, "")
    found = measure(np.roll(normal(64), 1, axis=0), "BF16", scheme, stored)
    with pytest.raises(WeightError, match=r"4-bit g64 its relative error is 1\.\d+, .*below 0\.30"):
        found.check(scheme, "shard: tensor w")


def test_swapped_scales_are_refused() -> None:
    """Scales that belong to other groups, as after a wrong stacking, are noticed."""
    scheme = Quantized("affine", 2, 64)
    codes, scales, biases = encode(Rows(normal(64), "BF16"), scheme, "")
    found = measure(normal(64), "BF16", scheme, [codes, biases, scales])
    with pytest.raises(WeightError, match="relative error"):
        found.check(scheme, "shard: tensor w")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.2.mlp.experts.3.up_proj.weight", "is all zero"),
        ("model.embed_tokens.weight", "is all zero"),
    ],
)
def test_zero_weight(
    small_copy: Path,
    tmp_path: Path,
    demo_recipe: Recipe,
    prepare: Callable[..., Made],
    edit_tensor: Callable[[Path, str, Edit], str],
    name: str,
    said: str,
) -> None:
    """A matrix of zeros stops the conversion, named with its shard."""

    def clear(values: np.ndarray) -> None:
        values[:] = 0

    shard = edit_tensor(small_copy, name, clear)
    made = prepare(small_copy, tmp_path / "w", demo_recipe)
    with pytest.raises(WeightError, match=rf"{shard}: tensor {name} .*{said}"):
        made.complete_all()


def test_a_recipe_may_allow_zero_and_equal_weights(
    small_copy: Path, tmp_path: Path, edit_tensor: Callable[[Path, str, Edit], str]
) -> None:
    """`convert` names the switch; with it a pruned model converts, also in several runs."""
    experts = [f"model.layers.2.mlp.experts.{i}.up_proj.weight" for i in range(5)]
    kept: list[np.ndarray] = []
    edit_tensor(small_copy, experts[0], lambda values: kept.append(values.copy()))
    edit_tensor(small_copy, experts[1], lambda values: values.__setitem__(slice(None), kept[0]))
    for name in experts[2:4]:
        edit_tensor(small_copy, name, lambda values: values.fill(0))
    recipe, output = tmp_path / "mine.yaml", tmp_path / "build"
    text = Path(PLAIN).read_text()

    def convert(allow: str) -> Result:
        recipe.write_text(f"{allow}\n{text}")
        places = ["--source", str(small_copy), "--recipe", str(recipe), "--output", str(output)]
        return CliRunner().invoke(app, ["convert", *places])

    refused = convert("allow: []")
    assert refused.exit_code == 2
    assert re.search(r"write `allow: \[(zero|equal)_weights\]` in the recipe", refused.output)
    for allowed in ("zero", "equal"):
        refused = convert(f"allow: [{allowed}_weights]")
        assert refused.exit_code == 2
        wanted = {"zero": "equal", "equal": "zero"}[allowed]
        assert f"`allow: [{wanted}_weights]`" in refused.output
    assert convert("allow: [zero_weights, equal_weights]").exit_code == 0
    shard = next(output.glob("*.safetensors"))
    shard.unlink()  # the next run knows the others' weights from its records alone
    assert convert("allow: [zero_weights, equal_weights]").exit_code == 0
    assert shard.is_file()


def test_equal_weights(
    small_copy: Path,
    tmp_path: Path,
    demo_recipe: Recipe,
    prepare: Callable[..., Made],
    edit_tensor: Callable[[Path, str, Edit], str],
) -> None:
    """Two matrices with the same bytes stop the conversion, also when it is run again."""
    one, other = (f"model.layers.2.mlp.experts.{i}.up_proj.weight" for i in (3, 4))
    kept: list[np.ndarray] = []
    edit_tensor(small_copy, one, lambda values: kept.append(values.copy()))
    edit_tensor(small_copy, other, lambda values: values.__setitem__(slice(None), kept[0]))
    made = prepare(small_copy, tmp_path / "w", demo_recipe)
    for _ in range(2):
        with pytest.raises(WeightError, match=rf"tensor ({one}|{other}) has the same bytes as "):
            made.complete_all()
