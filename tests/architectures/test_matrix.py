"""Every architecture: what is converted is what `mlx_lm.convert` makes, byte for byte."""

import contextlib
import io
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import load_model, quantize_model

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.quantize.assemble import assemble
from glm_quant.quantize.convert import Conversion
from glm_quant.quantize.plan import make_plan
from glm_quant.quantize.verify import verify
from glm_quant.recipe import load_recipe
from glm_quant.workspace import Workspace
from tests.architectures.native_models import make_native_checkpoint, model_names
from tests.architectures.small_models import make_small_checkpoint

# Saved by transformers, in the layout of vendors.
VENDOR = """
afmoe apertus cohere cohere2 deepseek_v3 deepseek_v32 dots1 ernie4_5 ernie4_5_moe exaone_moe
falcon_mamba gemma gemma2 gemma3 gemma3_text gemma4_text glm glm4 glm4_moe glm4_moe_lite
gpt_bigcode gpt_neox gptj granite granitemoe helium hunyuan_v1_dense internlm3 iquestcoder laguna
lfm2 lfm2_moe llama llava longcat_flash mamba mamba2 mellum minimax_m2 minimax_m3_vl ministral3
mistral mistral4 mixtral nemotron nemotron_h olmo2 olmo3 olmoe phi phi3 qwen2 qwen2_moe qwen3
qwen3_5 qwen3_moe qwen3_next qwen3_vl seed_oss smollm3 stablelm starcoder2
"""
# Of mlx-lm's models: `olmo` needs a package, `prism_hadamard_qwen35` is packed already, and the
# others are in the list above.
NATIVE_LEFT_OUT = {
    "gemma4",
    "gemma4_text",
    "glm_moe_dsa",
    "lfm2",
    "nemotron_h",
    "olmo",
    "prism_hadamard_qwen35",
}
NATIVE = [name for name in model_names() if name not in NATIVE_LEFT_OUT | set(VENDOR.split())]


def convert(source: Path, folder: Path, recipe_name: str) -> Path:
    """Convert without a command line, which would take seconds of imports for each."""
    checkpoint, recipe = Checkpoint.open(source), load_recipe(recipe_name)
    workspace = Workspace(folder)
    workspace.create()
    plan = make_plan(checkpoint, recipe)
    with Conversion(checkpoint, plan, workspace, workers=1) as conversion:
        for shard in range(len(plan.shards)):
            conversion.complete(shard)
    assemble(conversion, checkpoint, recipe, workspace.checkpoint)
    return workspace.checkpoint


def converted_by_mlx_lm(source: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Return the tensors and the quantization config that `mlx_lm.convert --q-bits 4` makes."""
    model, config = load_model(source, lazy=True)
    name = config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    casts = getattr(model, "cast_predicate", lambda _: True)

    def cast(path: str, value: mx.array) -> mx.array:
        floating = mx.issubdtype(value.dtype, mx.floating)
        return value.astype(getattr(mx, name)) if floating and casts(path) else value

    if name in ("float16", "bfloat16", "float32"):
        model.update(tree_map_with_path(cast, model.parameters()))
    with contextlib.redirect_stdout(io.StringIO()):
        model, config = quantize_model(model, config, 64, 4)
    return dict(tree_flatten(model.parameters())), config


def bits(array: mx.array) -> bytes:
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).tobytes()


def check(source: Path, folder: Path) -> None:
    """Hold a conversion tensor by tensor against mlx-lm's, and verify it."""
    with mx.stream(mx.cpu):
        output = convert(source, folder, "uniform-4bit")
        expected, _ = converted_by_mlx_lm(source)
        made: dict[str, mx.array] = {}
        for shard in output.glob("*.safetensors"):
            made |= mx.load(str(shard))
        assert made.keys() == expected.keys()
        for name, array in expected.items():
            assert made[name].dtype == array.dtype, name
            assert made[name].shape == array.shape, name
            assert bits(made[name]) == bits(array), name
        # Stock mlx-lm loads it, without code of ours.
        load_model(output, lazy=True)
    assert verify(output, source).rederived_blocks > 0


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """Where the checkpoint and its conversion stand."""
    return tmp_path / "source", tmp_path / "work"


@pytest.mark.parametrize("model_type", VENDOR.split())
def test_vendors_layout_converts_as_mlx_lm_does(model_type: str, places: tuple[Path, Path]) -> None:
    """A checkpoint as transformers saves it gives `mlx_lm.convert`'s bytes, and verifies."""
    make_small_checkpoint(model_type, places[0])
    check(*places)


@pytest.mark.parametrize("name", NATIVE)
def test_every_other_model_of_mlx_lm_converts(name: str, places: tuple[Path, Path]) -> None:
    """A checkpoint under mlx-lm's own names gives `mlx_lm.convert`'s bytes, and verifies."""
    make_native_checkpoint(name, places[0])
    check(*places)
