"""Opening an architecture: what it tells, and what it refuses before anything is built."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glm_quant.architectures.architecture import Architecture, open_architecture
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import CheckpointError
from tests.architectures.small_models import make_small_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Makes the small checkpoint of an architecture, once."""
    folder = tmp_path_factory.mktemp("small")

    def make(model_type: str) -> Checkpoint:
        if not (folder / model_type).exists():
            make_small_checkpoint(model_type, folder / model_type)
        return Checkpoint.open(folder / model_type)

    return make


def opened(source: Checkpoint, **changes: Any) -> Architecture:
    return open_architecture({**source.config, **changes}, source.tensors.values())


def test_a_mixture_of_experts_has_its_groups(checkpoint: Callable[[str], Checkpoint]) -> None:
    """Experts are stacked, and each parameter is in the group that a recipe speaks of."""
    architecture = opened(checkpoint("qwen2_moe"))
    groups = {parameter.name: parameter.group for parameter in architecture.parameters}
    layer = "model.layers.2"
    assert groups[f"{layer}.mlp.switch_mlp.gate_proj.weight"] == "routed_experts"
    assert groups[f"{layer}.mlp.shared_expert.up_proj.weight"] == "shared_experts"
    assert groups[f"{layer}.mlp.gate.weight"] == "router"
    assert groups[f"{layer}.self_attn.q_proj.weight"] == "attention"
    assert groups[f"{layer}.input_layernorm.weight"] == "norms"
    assert groups["model.embed_tokens.weight"] == "embeddings"
    assert groups["lm_head.weight"] == "lm_head"
    parameters = {parameter.name: parameter for parameter in architecture.parameters}
    experts = parameters[f"{layer}.mlp.switch_mlp.down_proj.weight"]
    assert experts.shape == (8, 64, 64)
    assert experts.layer == 2
    assert experts.quantizable
    assert not parameters[f"{layer}.input_layernorm.weight"].quantizable


def test_linear_attention_is_no_attention(checkpoint: Callable[[str], Checkpoint]) -> None:
    """State-space and linear-attention parts are `other`, the full layers' are `attention`."""
    architecture = opened(checkpoint("qwen3_next"))
    groups = {parameter.name: parameter.group for parameter in architecture.parameters}
    assert groups["model.layers.0.linear_attn.in_proj_qkvz.weight"] == "other"
    assert groups["model.layers.3.self_attn.q_proj.weight"] == "attention"


def test_what_the_model_does_not_use_is_dropped(checkpoint: Callable[[str], Checkpoint]) -> None:
    """A vision tower is named among what is dropped."""
    architecture = opened(checkpoint("qwen3_vl"))
    assert architecture.dropped
    assert all("visual" in name for name in architecture.dropped)


def test_an_unknown_model_type_names_its_neighbours(
    checkpoint: Callable[[str], Checkpoint],
) -> None:
    """The error has mlx-lm's version and the nearest names."""
    with pytest.raises(CheckpointError, match=r"'qwen3_mole'.*mlx-lm 0\.\d+.*qwen3_moe"):
        opened(checkpoint("llama"), model_type="qwen3_mole")


@pytest.mark.parametrize("model_type", ["../evil", "os", None, 3, "utils"])
def test_a_model_type_imports_nothing_else(
    model_type: Any, checkpoint: Callable[[str], Checkpoint]
) -> None:
    """A name that is no model of mlx-lm reaches no import."""
    with pytest.raises(CheckpointError, match="does not know"):
        opened(checkpoint("llama"), model_type=model_type)


def test_a_config_that_the_class_refuses_gives_its_reason(
    checkpoint: Callable[[str], Checkpoint],
) -> None:
    """mlx-lm's own words, in one line."""
    source = checkpoint("llama")
    config = {key: value for key, value in source.config.items() if key != "hidden_size"}
    with pytest.raises(CheckpointError, match=r"mlx_lm\.models\.llama .*hidden_size"):
        open_architecture(config, source.tensors.values())


def test_a_missing_tensor_is_named(checkpoint: Callable[[str], Checkpoint]) -> None:
    """The strict check is mlx-lm's own."""
    source = checkpoint("llama")
    some = [info for name, info in source.tensors.items() if "layers.3.mlp" not in name]
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp"):
        open_architecture(source.config, some)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 1_000_000_000),
        ("hidden_size", 1 << 40),
        ("rope_scaling", {"factor": {"num_layers": 10**9}}),
    ],
)
def test_dims_beyond_any_model_are_refused(
    key: str, value: Any, checkpoint: Callable[[str], Checkpoint]
) -> None:
    """Nothing is built from a config that would fill the memory."""
    with pytest.raises(CheckpointError, match="beyond any real model"):
        opened(checkpoint("llama"), **{key: value})


def test_code_of_the_source_is_not_run(
    tmp_path: Path, checkpoint: Callable[[str], Checkpoint]
) -> None:
    """A config that names a file of code is read as one that does not."""
    source = checkpoint("llama")
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    config = json.loads(json.dumps(source.config)) | {"model_file": str(tmp_path / "evil.py")}
    assert open_architecture(config, source.tensors.values()).module == "mlx_lm.models.llama"
