"""What the release's tensors become: nothing lost, nothing twice, in MLX's layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm_quant.architectures.architecture import open_architecture
from glm_quant.architectures.expressions import describe
from glm_quant.architectures.replay import Replay
from glm_quant.architectures.weights import OutputWeight
from glm_quant.checkpoint.header import TensorInfo
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import CheckpointError, MissingTensorError, ShapeError
from glm_quant.model.geometry import Geometry
from glm_quant.model.release import check_names, check_shapes, release_weights
from tests.synthetic import small_config

configs = st.builds(
    lambda layers, dense, experts, heads, mtp: (
        small_config(layers, experts)
        | {
            "first_k_dense_replace": dense,
            "num_attention_heads": heads,
            "num_nextn_predict_layers": mtp,
        }
    ),
    st.integers(1, 12),
    st.integers(0, 3),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(0, 2),
)


def weight_map_of(geometry: Geometry) -> dict[str, str]:
    names = [n for n, _, _ in [*geometry.tensors(), *geometry.mtp_tensors()]]
    return dict.fromkeys(names, "model.safetensors")


def weights_of(checkpoint: Checkpoint) -> list[OutputWeight]:
    geometry = Geometry.from_config(checkpoint.config)
    return release_weights(geometry, checkpoint.index.weight_map, None)


@given(config=configs)
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_row_comes_from_one_place(
    index_only: Callable[..., Checkpoint], config: dict[str, Any]
) -> None:
    """Names are injective: outputs differ, and each row of each has exactly one source."""
    checkpoint = index_only(config)
    geometry = Geometry.from_config(config)
    outputs = weights_of(checkpoint)
    names = [output.name for output in outputs]
    assert len(names) == len(set(names))
    used: list[str] = []
    for output in outputs:
        row = 0
        for segment in output.segments:
            assert segment.first_row == row
            row += segment.rows
            used.append(segment.source)
        assert row == output.rows
    assert set(used) == {name for name, _, _ in geometry.tensors()}
    twice = {name for name in used if used.count(name) > 1}
    assert all(name.endswith("kv_b_proj.weight") for name in twice)
    assert len(twice) == config["num_hidden_layers"]
    elements = sum(output.params for output in outputs)
    assert elements == sum(int(np.prod(shape)) for _, shape, _ in geometry.tensors())


def test_split_of_kv_b(index_only: Callable[..., Checkpoint]) -> None:
    """embed_q is each head's first rows transposed, unembed_out the rest (facts §6.3)."""
    heads, nope, v, rank = 4, 64, 64, 64
    source = np.arange(heads * (nope + v) * rank, dtype=np.float32).reshape(-1, rank)
    by_head = source.reshape(heads, nope + v, rank)
    outputs = {output.name: output for output in weights_of(index_only(small_config()))}
    replay = Replay(lambda _name, begin, end: mx.array(source.reshape(-1)[begin:end]))
    expected = {
        "embed_q": by_head[:, :nope].transpose(0, 2, 1).reshape(-1, nope),
        "unembed_out": by_head[:, nope:].reshape(-1, rank),
    }
    for name, rows in expected.items():
        [segment] = outputs[f"model.layers.0.self_attn.{name}.weight"].segments
        np.testing.assert_array_equal(np.array(segment.replay(replay, 0, heads)), rows)


def test_the_expressions_are_those_of_the_runtime(small: Path) -> None:
    """What is planned without mlx-lm is what the runtime's own class makes of the checkpoint."""
    from glm_quant.model import glm_moe_dsa

    checkpoint = Checkpoint.open(small)
    geometry = Geometry.from_config(checkpoint.config)
    weights = release_weights(geometry, checkpoint.index.weight_map, checkpoint.tensors)
    architecture = open_architecture(
        checkpoint.config,
        checkpoint.tensors.values(),
        lambda _config: (glm_moe_dsa.Model, glm_moe_dsa.ModelArgs),
        cast=False,
    )
    planned = {weight.name: weight for weight in weights}
    assert planned.keys() == {parameter.name for parameter in architecture.parameters}
    for parameter in architecture.parameters:
        weight = planned[parameter.name]
        assert describe(weight.expression) == describe(parameter.expression)
        assert weight.group == parameter.group
        assert weight.quantizable == parameter.quantizable


def test_shapes_of_kv_b_in_the_release(release: Path) -> None:
    """In GLM-5.2 they are (64, 512, 192) and (64, 256, 512)."""
    checkpoint = Checkpoint.open(release)
    outputs = weights_of(checkpoint)
    shapes = {output.name: output.shape for output in outputs}
    assert shapes["model.layers.0.self_attn.embed_q.weight"] == (64, 512, 192)
    assert shapes["model.layers.0.self_attn.unembed_out.weight"] == (64, 256, 512)
    assert shapes["model.layers.3.mlp.switch_mlp.down_proj.weight"] == (256, 6144, 2048)


def test_tensor_absent_from_the_index(index_only: Callable[..., Checkpoint]) -> None:
    """A tensor that the config implies and the index lacks is named, with both counts."""
    checkpoint = index_only(small_config())
    geometry = Geometry.from_config(checkpoint.config)
    weight_map = dict(checkpoint.index.weight_map)
    del weight_map["model.layers.2.mlp.experts.7.up_proj.weight"]
    expected = sum(1 for _ in geometry.tensors())
    with pytest.raises(
        MissingTensorError,
        match=rf"tensor model\.layers\.2\.mlp\.experts\.7\.up_proj\.weight is missing.*"
        rf"{expected} tensors expected without MTP, {expected - 1} found",
    ):
        check_names(geometry, weight_map)


@pytest.mark.parametrize(
    ("name", "mtp"),
    [
        ("model.vision_tower.weight", 1),
        ("model.layers.2.mlp.experts.12.up_proj.weight", 1),
        ("model.layers.1.self_attn.q_a_proj.weight_scale_inv", 1),
        ("model.layers.4.eh_proj.weight", 0),
    ],
)
def test_tensor_that_no_glm_has(name: str, mtp: int) -> None:
    """A tensor that the config does not imply is refused: it would be lost silently."""
    geometry = Geometry.from_config(small_config() | {"num_nextn_predict_layers": mtp})
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is none that config"):
        check_names(geometry, weight_map_of(geometry) | {name: "model.safetensors"})


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "message"),
    [
        ("lm_head.weight", "BF16", (256, 64), r"shape \[256, 64\], config.json implies \[256, 128"),
        ("lm_head.weight", "F8_E4M3", (256, 128), "dtype F8_E4M3, BF16 or F16 or F32 is needed"),
        (
            "model.layers.1.mlp.gate.e_score_correction_bias",
            "BF16",
            (12,),
            "dtype BF16, F32 is needed",
        ),
    ],
)
def test_header_that_disagrees(name: str, dtype: str, shape: tuple[int, ...], message: str) -> None:
    """A shape or dtype that config.json does not imply names shard, tensor and both."""
    geometry = Geometry.from_config(small_config())
    tensors = {
        n: TensorInfo(n, "F32" if kind == "F32" else "BF16", s, "model.safetensors", 0, 0)
        for n, s, kind in geometry.tensors()
    }
    check_shapes(geometry, tensors)
    tensors[name] = TensorInfo(name, dtype, shape, "model-7.safetensors", 0, 0)
    with pytest.raises(ShapeError, match=rf"^model-7\.safetensors: tensor {name} has .*{message}"):
        check_shapes(geometry, tensors)


def test_parts_of_two_dtypes() -> None:
    """Experts that are stored in different dtypes cannot be stacked."""
    geometry = Geometry.from_config(small_config())
    tensors = {
        n: TensorInfo(n, "F32" if kind == "F32" else "BF16", s, "model.safetensors", 0, 0)
        for n, s, kind in geometry.tensors()
    }
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    tensors[name] = TensorInfo(name, "F16", tensors[name].shape, "model.safetensors", 0, 0)
    with pytest.raises(ShapeError, match=rf"tensor {name} has dtype F16, the other parts"):
        check_shapes(geometry, tensors)
