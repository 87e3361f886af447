"""The shipped checkpoint has the release's shape, and does what its record says."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from glm_quant.data import held_out_text, tiny_glm_path
from glm_quant.evaluation.needle_prompts import PHRASINGS, build_needle_prompt, is_retrieved

RELEASE_CONFIG_KEYS = """
    architectures attention_bias attention_dropout dtype eos_token_id ep_size first_k_dense_replace
    head_dim hidden_act hidden_size index_head_dim index_n_heads index_share_for_mtp_iteration
    index_skip_topk_offset index_topk index_topk_freq index_topk_pattern indexer_rope_interleave
    indexer_types initializer_range intermediate_size kv_lora_rank max_position_embeddings
    mlp_layer_types model_type moe_intermediate_size moe_layer_freq moe_router_dtype n_group
    n_routed_experts n_shared_experts norm_topk_prob num_attention_heads num_experts_per_tok
    num_hidden_layers num_key_value_heads num_nextn_predict_layers pad_token_id pretraining_tp
    q_lora_rank qk_head_dim qk_nope_head_dim qk_rope_head_dim rms_norm_eps rope_interleave
    rope_parameters routed_scaling_factor scoring_func tie_word_embeddings topk_group topk_method
    transformers_version use_cache v_head_dim vocab_size
"""
"""Of zai-org/GLM-5.2's config.json at revision b4734de4."""

Headers = dict[str, dict[str, tuple[str, list[int]]]]


@pytest.fixture(scope="module")
def folder() -> Path:
    return tiny_glm_path()


@pytest.fixture(scope="module")
def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model.safetensors.index.json").read_text())


@pytest.fixture(scope="module")
def headers(folder: Path) -> Headers:
    """Give dtype and shape of every tensor, by shard, as the files themselves say."""
    found: Headers = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        with safe_open(path, framework="numpy") as shard:
            parts = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 - no dict
            found[path.name] = {
                name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()
            }
    return found


def _tensors(headers: Headers) -> dict[str, tuple[str, list[int]]]:
    return {name: value for shard in headers.values() for name, value in shard.items()}


def _size(entry: tuple[str, list[int]]) -> int:
    return math.prod(entry[1]) * {"BF16": 2, "F32": 4}[entry[0]]


def test_the_folder_is_small_enough_to_ship(folder: Path) -> None:
    """It travels in the repository, so it stays below 12 MB, and its text below 200 KB."""
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000_000
    assert len(held_out_text().encode()) <= 200_000


def test_config_has_the_releases_keys_sorted(config: dict[str, Any]) -> None:
    """No key is missing or added: `dtype` and not `torch_dtype`, sorted as the release's are."""
    assert set(config) == set(RELEASE_CONFIG_KEYS.split())
    assert list(config) == sorted(config)


def test_index_matches_the_shards(index: dict[str, Any], headers: Headers) -> None:
    """Every tensor is where the index says, and `total_size` is the sum of the tensors' bytes."""
    assert index["weight_map"] == {name: shard for shard, part in headers.items() for name in part}
    assert index["metadata"] == {"total_size": sum(map(_size, _tensors(headers).values()))}
    count = len(headers)
    assert 5 <= count <= 8
    assert list(headers) == [
        f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)
    ]


def test_shards_are_packed_greedily_in_lexicographic_order(
    index: dict[str, Any], headers: Headers
) -> None:
    """Names run in sorted order through the shards, and no shard could have taken one more."""
    names = list(index["weight_map"])
    assert names == sorted(names)
    shards = [index["weight_map"][name] for name in names]
    assert shards == sorted(shards)
    limit = 1_740_000
    sizes = {shard: sum(map(_size, part.values())) for shard, part in headers.items()}
    assert max(sizes.values()) <= limit
    for shard, following in zip(list(headers), list(headers)[1:], strict=False):
        first = min(headers[following])
        assert sizes[shard] + _size(headers[following][first]) > limit


def test_experts_straddle_shards(index: dict[str, Any], config: dict[str, Any]) -> None:
    """Some layer's experts lie in two shards, and so do one expert's three matrices."""
    layers: dict[str, set[str]] = defaultdict(set)
    experts: dict[str, set[str]] = defaultdict(set)
    for name, shard in index["weight_map"].items():
        if ".mlp.experts." in name:
            layers[name.split(".mlp.experts.")[0]].add(shard)
            experts[name.rsplit(".", 2)[0]].add(shard)
    assert any(len(shards) > 1 for shards in layers.values())
    assert any(len(shards) > 1 for shards in experts.values())
    # Two digits, so that sorted names are not in the order of numbers.
    assert config["n_routed_experts"] > 10


def test_only_the_routing_bias_is_float32(headers: Headers) -> None:
    """All else is BF16, as in the release."""
    for name, (dtype, _) in _tensors(headers).items():
        assert dtype == ("F32" if name.endswith("e_score_correction_bias") else "BF16"), name


def test_routing_bias_was_trained(folder: Path, index: dict[str, Any]) -> None:
    """Every routing bias holds values that differ: to drop one would change the routing."""
    names = [name for name in index["weight_map"] if name.endswith("e_score_correction_bias")]
    assert names
    for name in names:
        with safe_open(folder / index["weight_map"][name], framework="numpy") as shard:
            values = shard.get_tensor(name)
        assert values.std() > 1e-3, name


def test_indexers_stand_on_full_layers_only(config: dict[str, Any], headers: Headers) -> None:
    """The list agrees with the release's rule, and only its full layers and MTP have an indexer."""
    layers = config["num_hidden_layers"]
    offset, freq = config["index_skip_topk_offset"], config["index_topk_freq"]
    by_rule = ["full" if max(i - offset + 1, 0) % freq == 0 else "shared" for i in range(layers)]
    assert config["indexer_types"] == by_rule
    assert {"full", "shared"} == set(by_rule)
    full = {i for i, kind in enumerate(by_rule) if kind == "full"} | {layers}
    names = [name for name in _tensors(headers) if ".indexer." in name]
    assert {int(name.split(".")[2]) for name in names} == full
    assert len(names) == 5 * len(full)
    assert config["index_n_heads"] >= 32
    assert config["index_topk"] * 8 <= 512 <= config["max_position_embeddings"]


def test_mtp_layer_is_stored_past_the_last(config: dict[str, Any], headers: Headers) -> None:
    """It has its own projections and norms, experts and indexer, and no embedding or head."""
    at = f"model.layers.{config['num_hidden_layers']}."
    own = {name.removeprefix(at) for name in _tensors(headers) if name.startswith(at)}
    assert {
        "eh_proj.weight",
        "enorm.weight",
        "hnorm.weight",
        "shared_head.norm.weight",
        "self_attn.indexer.wq_b.weight",
        "mlp.gate.e_score_correction_bias",
        "mlp.experts.0.down_proj.weight",
    } <= own
    assert "shared_head.head.weight" not in own
    assert "embed_tokens.weight" not in own


def test_matrices_can_be_quantized_in_groups_of_64(headers: Headers) -> None:
    """64 divides the last dimension of every matrix, and what a split of kv_b_proj leaves."""
    for name, (_, shape) in _tensors(headers).items():
        if len(shape) == 2:
            assert shape[-1] % 64 == 0, name


def test_needle_prompt_is_reproducible_and_fits() -> None:
    """The same arguments give the same chat; it holds the answer, and is as long as asked."""

    def encode(text: str) -> list[int]:
        return list(text.encode())

    for phrasing in range(len(PHRASINGS)):
        arguments: dict[str, Any] = {
            "length_tokens": 2000, "depth": 0.5, "seed": 3, "phrasing": phrasing, "distractors": 2,
        }  # fmt: skip
        prompt = build_needle_prompt(encode, held_out_text(), **arguments)
        assert prompt == build_needle_prompt(encode, held_out_text(), **arguments)
        content = prompt.messages[0]["content"]
        assert prompt.reply in content
        assert is_retrieved(prompt.reply, prompt.expected)
        assert 1800 <= prompt.length_tokens <= 2000
        assert len(encode(content)) + 6 == prompt.length_tokens
        assert 0.3 < content.index(prompt.reply) / len(content) < 0.7


def test_needle_prompt_refuses_what_cannot_be() -> None:
    """Both numbers are in the message."""
    with pytest.raises(ValueError, match=r"of 20 tokens cannot hold its own \d+ tokens"):
        build_needle_prompt(
            lambda text: list(text.encode()), "a\n", length_tokens=20, depth=0, seed=1
        )
    with pytest.raises(ValueError, match="depth is 2"):
        build_needle_prompt(
            lambda text: list(text.encode()), "a\n", length_tokens=99, depth=2, seed=1
        )


def test_a_wrong_number_is_not_retrieved() -> None:
    """A reply counts by its first number, whole."""
    assert not is_retrieved("The secret code of Otter is 47190.", "4719")
    assert not is_retrieved("no idea", "4719")


def test_reference_reads_text_and_finds_a_needle(folder: Path) -> None:
    """transformers loads it; perplexity is the recorded one, and a needle at 4 x top-k is found."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from dev.measure_tiny import load_reference, perplexity, reply_to

    record = json.loads((folder / "training.json").read_text())
    model, tokenizer = load_reference(folder)
    tokens = tokenizer(held_out_text(), add_special_tokens=False)["input_ids"]
    # The recorded figure is of the whole text; the beginning's own is recorded for this test.
    measured = perplexity(model, tokens[:4096])
    assert measured <= record["held_out_perplexity_first_4096_tokens"] * 1.05
    assert measured < model.config.vocab_size / 30

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts = [
        build_needle_prompt(
            encode,
            held_out_text(),
            length_tokens=4 * model.config.index_topk,
            depth=depth,
            seed=seed,
            phrasing=seed,
        )
        for seed, depth in enumerate((0.1, 0.4, 0.6, 0.9))
    ]
    hits = [is_retrieved(reply_to(model, tokenizer, one), one.expected) for one in prompts]
    assert sum(hits) >= 3
