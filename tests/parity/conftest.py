"""Random small checkpoints in the release's layout, and the comparison that every test asks for."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.data import tiny_glm_path
from glm_quant.model import glm_moe_dsa
from glm_quant.parity.candidate import load_unquantized, logits_of, to_numpy
from glm_quant.parity.measures import relative_error
from glm_quant.parity.reference import ReferenceModel
from glm_quant.parity.whole import reference_outcomes, whole_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = tiny_glm_path()

# Issue 3: max |Δlogit| relative to the logits' scale in float32, at every position.
BOUND = 2e-5

# As GLM-5.2 in small: three dense layers, IndexShare, 32 index heads (fewer make exact ties).
SMALL: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "index_n_heads": 32,
    "index_head_dim": 32,
    "index_topk": 16,
    "index_topk_freq": 3,
    "index_skip_topk_offset": 3,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}
# Keys of the release that transformers does not write again.
RELEASE = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "indexer_rope_interleave": True,
}

Edit = Callable[[dict[str, Any]], None]


@dataclass
class Pair:
    """A source checkpoint and an output folder with our runtime and its config."""

    source: Path
    output: Path

    def configure(self, **values: Any) -> None:
        """Change the output's config."""
        path = self.output / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))


def make_pair(
    folder: Path, seed: int = 0, *, mtp: bool = False, edit: Edit | None = None, **dims: Any
) -> Pair:
    """Write a random model as the release stores it, and an empty output beside it.

    Args:
        folder: Where `source` and `output` go.
        seed: Of the weights.
        mtp: Store a multi-token-prediction layer past the last one.
        edit: Changes the state dict before it is stored.
        dims: Config keys that differ from `SMALL`; None removes one.
    """
    values = {k: v for k, v in (SMALL | dims).items() if v is not None}
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    torch.manual_seed(seed)
    model = transformers.GlmMoeDsaForCausalLM(transformers.GlmMoeDsaConfig(**values)).float()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name or "e_score" in name:
                tensor.add_(torch.randn_like(tensor) * 0.1)
        if edit is not None:
            edit(dict(model.named_parameters()))
    source, output = folder / "source", folder / "output"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(source)
    written = json.loads((source / "config.json").read_text())
    # Only what was asked for decides the schedule: transformers writes the list it derived.
    if "indexer_types" not in dims:
        written.pop("indexer_types")
    config = written | RELEASE | {k: v for k, v in values.items() if k != "initializer_range"}
    (source / "config.json").write_text(json.dumps(config))
    if mtp:
        _add_mtp(source, values["num_hidden_layers"])
    output.mkdir()
    shutil.copy(glm_moe_dsa.__file__, output)
    ours = {"model_file": "glm_moe_dsa.py", "indexer_norm_eps": 1e-6}
    (output / "config.json").write_text(json.dumps(config | ours))
    return Pair(source, output)


def _add_mtp(source: Path, layer: int) -> None:
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    last = f"model.layers.{layer - 1}."
    extra = {
        name.replace(last, f"model.layers.{layer}."): value
        for name, value in weights.items()
        if name.startswith(last)
    }
    extra[f"model.layers.{layer}.enorm.weight"] = mx.ones((8,))
    mx.eval(weights, extra)
    mx.save_safetensors(str(source / "model.safetensors"), weights | extra, {"format": "pt"})


def seeded_tokens(length: int, vocab_size: int = 160, seed: int = 0) -> Any:
    """Token ids, [length]; never 0, whose embedding some configs pad with zeros (all ties)."""
    return np.random.default_rng(seed).integers(1, vocab_size, length)


def errors(pair: Pair, tokens: Any, reference: Any | None = None) -> dict[str, float]:
    """Relative logit errors of the runtime in every way that mlx-lm calls it."""
    if reference is None:
        reference = ReferenceModel(pair.source).logits(tokens)
    model = load_unquantized(pair.source, pair.output)
    length = len(tokens)
    odd = [7] * (length // 7) + ([length % 7] if length % 7 else [])
    return {
        "one call": relative_error(logits_of(model, tokens), reference),
        "one call with cache": relative_error(logits_of(model, tokens, [length]), reference),
        "chunks of 7": relative_error(logits_of(model, tokens, odd), reference),
        "token by token": relative_error(logits_of(model, tokens, [1] * length), reference),
        "left-padded batch": relative_error(padded(model, tokens), reference),
    }


def padded(model: Any, tokens: Any) -> Any:
    """Logits of `tokens` as the middle one of three left-padded sequences, in uneven calls."""
    from mlx_lm.models.cache import BatchKVCache

    length, pads = len(tokens) + 5, [2, 5, 0]
    batch = np.zeros((3, length), np.int32)
    batch[0, pads[0] :] = seeded_tokens(length - pads[0], seed=1)
    batch[1, pads[1] :] = tokens
    batch[2] = seeded_tokens(length, seed=2)
    cache = [BatchKVCache(pads) for _ in model.layers]
    ids, outputs = mx.array(batch), []
    cuts = sorted({0, length // 2, length - 3, length - 2, length - 1, length})
    for start, stop in pairwise(cuts):
        outputs.append(to_numpy(model(ids[:, start:stop], cache=cache)[1]))
    return np.concatenate(outputs)[pads[1] :]


def assert_equal(pair: Pair, tokens: Any) -> None:
    """Every way of calling within the bound; where a tie is at work, with ties settled.

    A tie moves logits by far more than rounding, so a breach is looked into and not excused: no row
    may differ by more than a tie, and with ties decided as the reference did the bound must hold.
    """
    found = errors(pair, tokens)
    if max(found.values()) <= BOUND:
        return
    outcomes = reference_outcomes(Checkpoint.open(pair.source), tokens)
    whole = whole_logits(pair.source, pair.output, tokens, outcomes)
    assert whole.wrong == 0, found
    assert whole.tied > 0, found
    assert max(whole.below_topk, whole.above_topk, whole.cached) <= BOUND, (found, whole)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's build of the trained checkpoint, made by the command line."""
    output = tmp_path_factory.mktemp("demo") / "build"
    program = Path(sys.executable).with_name("glm-quant")
    command = [program, "convert", "--source", TINY, "--recipe", "demo", "--output", output]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return output


@pytest.fixture(scope="session")
def suite() -> SimpleNamespace:
    """The helpers above, for tests that cannot import this file."""
    return SimpleNamespace(
        bound=BOUND,
        tiny=TINY,
        make_pair=make_pair,
        seeded_tokens=seeded_tokens,
        errors=errors,
        assert_equal=assert_equal,
    )
