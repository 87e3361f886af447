"""The tensors that a config implies, and configs that imply none."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import CheckpointError
from glm_quant.model.geometry import Geometry
from tests.synthetic import small_config


def test_release_has_exactly_these_tensors(release: Path) -> None:
    """The config of GLM-5.2 implies the 59,585 names of its index, no more and no fewer."""
    checkpoint = Checkpoint.open(release)
    geometry = Geometry.from_config(checkpoint.config)
    names = [name for name, _, _ in [*geometry.tensors(), *geometry.mtp_tensors()]]
    assert len(names) == len(set(names)) == 59_585
    assert set(names) == set(checkpoint.index.weight_map)


def test_full_layers_of_the_release(release: Path) -> None:
    """The 21 layers with an indexer are those of facts §4.1, by list and by formula."""
    config = Checkpoint.open(release).config
    full = [0, 1, 2, *range(6, 78, 4)]
    assert len(full) == 21
    for given_config in (config, config | {"indexer_types": None}):
        types = Geometry.from_config(given_config).indexer_types
        assert [i for i, kind in enumerate(types) if kind == "full"] == full


def test_schedule_by_pattern_and_default() -> None:
    """A pattern of F and S is understood; GLM-5, without any of the keys, is full everywhere."""
    config = small_config() | {"indexer_types": None}
    pattern = config | {"index_topk_pattern": "FSSF"}
    assert Geometry.from_config(pattern).indexer_types == ("full", "shared", "shared", "full")
    plain = {k: v for k, v in config.items() if not k.startswith("index_") or "topk_" not in k}
    assert set(Geometry.from_config(plain).indexer_types) == {"full"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, r"model_type is 'llama'; this converter makes 'glm_moe_dsa'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_size": None}, "hidden_size is None, a whole number of at least 1 is needed"),
        ({"hidden_size": "128"}, "hidden_size is '128', a whole number"),
        ({"hidden_size": 0}, "hidden_size is 0, a whole number of at least 1"),
        ({"hidden_size": -128}, "hidden_size is -128"),
        ({"hidden_size": 128.0}, r"hidden_size is 128\.0"),
        ({"n_routed_experts": True}, "n_routed_experts is True"),
        ({"vocab_size": 1 << 40}, "vocab_size is 1,099,511,627,776, beyond any real model"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000, beyond any real"),
        ({"n_routed_experts": 10**9}, "n_routed_experts is 1,000,000,000, beyond any real"),
        (
            {"num_hidden_layers": 4096, "n_routed_experts": 4096, "indexer_types": None},
            "4,096 layers of 4,096 experts are 16,777,216, beyond any real model",
        ),
        ({"indexer_types": ["full"]}, "indexer_types has 1 entries, num_hidden_layers is 4"),
        ({"indexer_types": ["shared"] * 4}, "indexer_types begins with a shared layer"),
        ({"indexer_types": ["full", "odd", "full", "full"]}, "indexer_types holds 'odd'"),
        ({"indexer_types": 4}, "indexer_types is 4, a list is needed"),
        ({"indexer_types": None, "index_topk_freq": "x"}, "index_topk_freq is 'x', a whole number"),
        ({"indexer_types": None, "index_topk_freq": []}, r"index_topk_freq is \[\], a whole"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
    ],
)
def test_config_that_cannot_be(change: dict[str, Any], message: str) -> None:
    """A config with a wrong or missing value is refused; key and value are named."""
    with pytest.raises(CheckpointError, match=message) as raised:
        Geometry.from_config(small_config() | change)
    assert str(raised.value).startswith("config.json: ")


@given(
    st.dictionaries(
        st.sampled_from(sorted(small_config())),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()),
    )
)
def test_any_config_is_a_geometry_or_an_error(change: dict[str, Any]) -> None:
    """Whatever values a config has, the answer is a geometry or a CheckpointError."""
    try:
        geometry = Geometry.from_config(small_config() | change)
    except CheckpointError:
        return
    assert len(geometry.indexer_types) == geometry.num_hidden_layers
