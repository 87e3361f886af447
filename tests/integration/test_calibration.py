"""Calibration: importance is that of the inputs, and `search` converts with them."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from glm_quant.calibration import calibrate as calibration
from glm_quant.calibration.calibrate import calibrate
from glm_quant.calibration.hessian import cholesky_factor, importances
from glm_quant.calibration.observe import Listener
from glm_quant.calibration.texts import calibration_set
from glm_quant.checkpoint.imatrix import Imatrix, ImatrixRecord
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.convert import convert_to_folder, open_conversion
from glm_quant.data import tiny_glm_path
from glm_quant.errors import IntegrityError, OutputError, RecipeError
from glm_quant.evaluation.token_set import TokenSet
from glm_quant.quantize.verify import verify
from glm_quant.settings import CalibrationSettings
from glm_quant.streaming.weights import SourceWeights

TOKENS, CONTEXT = 192, 96  # past index_topk, in two sequences


class Quiet:
    """Watches without a word."""

    def begin(self, stage: str) -> None:
        """Ignore it."""

    def move(self, stage: str, done: int, total: int) -> None:
        """Ignore it."""


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    """The small trained checkpoint."""
    return Checkpoint.open(tiny_glm_path())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of the kind that the checkpoint has learned."""
    path = tmp_path_factory.mktemp("text") / "code.py"
    path.write_text(Path(calibration.__file__).read_text())
    return path


def token_set(source: Checkpoint, text: Path) -> TokenSet:
    """The text in sequences of `CONTEXT` tokens."""
    settings = CalibrationSettings(texts={"code": str(text)}, tokens=TOKENS, context=CONTEXT)
    return calibration_set(source, settings)


@pytest.fixture(scope="module")
def folder(source: Checkpoint, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imatrix folder."""
    output = tmp_path_factory.mktemp("imatrix") / "imatrix"
    calibrate(source, token_set(source, text), output)
    return output


def test_importance_is_that_of_the_inputs(source: Checkpoint, text: Path, folder: Path) -> None:
    """Importance equals that of a whole layer that runs by itself on the same embeddings."""
    weights = SourceWeights(source)
    batch = token_set(source, text).sequences
    layer = weights.layer(0)
    seen: dict[str, list[np.ndarray]] = {"down": [], "out": []}
    layer.mlp.down_proj = Listener(layer.mlp.down_proj, seen["down"].append)
    layer.self_attn.o_proj = Listener(layer.self_attn.o_proj, seen["out"].append)
    for sequence in batch:
        x = mx.array(weights.embed(sequence))[None]
        mx.eval(layer(x, weights.runtime.Span.of(None), None, None)[0])
    imatrix = Imatrix.open(folder)
    for path, parts in (("mlp.down_proj", seen["down"]), ("self_attn.o_proj", seen["out"])):
        met = np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])
        expected, _ = importances(
            (met.astype(np.float64) ** 2).sum(0)[None], np.array([len(met)]), 1
        )
        importance = imatrix.importance(f"model.layers.0.{path}")
        assert importance is not None
        found = importance.of_rows(0, 1, 64)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_experts_count_only_their_own_tokens(source: Checkpoint, folder: Path) -> None:
    """A layer's experts met each token once for every choice, and thin ones are counted."""
    record = Imatrix.open(folder).record
    chosen = int(source.config["num_experts_per_tok"])
    for counts in record.coverage.values():
        assert sum(counts) == record.tokens * chosen
    for layer, counts in record.coverage.items():
        weight = record.weights[f"model.layers.{layer}.mlp.switch_mlp.down_proj"]
        assert weight.thin == sum(count < record.least_tokens for count in counts)


def test_interrupted_pass_goes_on(
    source: Checkpoint, text: Path, folder: Path, tmp_path: Path
) -> None:
    """A pass that dies in a later layer goes on there and leaves the same bytes."""
    batch = token_set(source, text)

    def stop(done: int, total: int) -> None:
        del total
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(source, batch, tmp_path / "imatrix", progress=stop)
    layers: list[int] = []
    calibrate(source, batch, tmp_path / "imatrix", progress=lambda done, _: layers.append(done))
    assert layers == [4, 5]
    for path in folder.iterdir():
        assert (tmp_path / "imatrix" / path.name).read_bytes() == path.read_bytes()


def test_thin_units_have_the_mean_of_all() -> None:
    """Of three experts one met nothing: it gets the tokens' mean; all rows have mean 1."""
    sums = np.array([[40.0, 120.0], [0.0, 0.0], [10.0, 0.0]])
    importance, thin = importances(sums, np.array([40, 0, 40]), 32)
    assert thin == 1
    np.testing.assert_allclose(importance[0], [0.5, 1.5])
    np.testing.assert_allclose(importance[1], [2 * 50 / 170, 2 * 120 / 170])
    assert importance[2, 1] > 0  # no column's error is free
    np.testing.assert_allclose(importance.mean(axis=1), 1, rtol=1e-6)


def recipe(folder: Path, imatrix: str | None) -> Path:
    """Write a recipe that searches the experts' codes."""
    rules = [
        {"group": "routed_experts", "bits": 2, "quantizer": "search"},
        {"group": "mtp", "drop": True},
        {"match": ".*", "dtype": "source"},
    ]
    text = {"name": "r", "description": "d", "rules": rules, "shard_bytes": 1 << 20}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(text | ({"imatrix": imatrix} if imatrix else {})))
    return path


def test_search_uses_it(folder: Path, tmp_path: Path) -> None:
    """With an imatrix just the experts' shards get other bytes; verify derives the same ones."""
    made: list[dict[str, bytes]] = []
    for name in (None, str(folder)):
        output = tmp_path / "build"
        opened = open_conversion(tiny_glm_path(), str(recipe(tmp_path, name)), output)
        convert_to_folder(opened, Quiet())
        made.append({path.name: path.read_bytes() for path in output.glob("*.safetensors")})
        for shard, data in made[0].items():
            has_experts = b".switch_mlp." in data
            assert (made[-1][shard] != data) == (has_experts and name is not None)
    assert verify(output, tiny_glm_path(), samples=20).rederived_blocks == 20


@pytest.fixture(scope="module")
def factors(source: Checkpoint, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imatrix folder with factors."""
    output = tmp_path_factory.mktemp("factors") / "imatrix"
    calibrate(source, token_set(source, text), output, factors=True)
    return output


def test_factors_come_from_the_inputs(source: Checkpoint, text: Path, factors: Path) -> None:
    """A layer's factor is that of the inputs it meets; weights that share an input share a file."""
    weights = SourceWeights(source)
    seen: list[np.ndarray] = []
    layer = weights.layer(0)
    layer.self_attn.o_proj = Listener(layer.self_attn.o_proj, seen.append)
    for sequence in token_set(source, text).sequences:
        x = mx.array(weights.embed(sequence))[None]
        mx.eval(layer(x, weights.runtime.Span.of(None), None, None)[0])
    met = np.concatenate([part.reshape(-1, part.shape[-1]) for part in seen]).astype(np.float64)
    imatrix = Imatrix.open(factors)
    factor = imatrix.factor("model.layers.0.self_attn.o_proj")
    assert factor is not None
    expected = cholesky_factor(met.T @ met, len(met))
    np.testing.assert_allclose(factor.load(), expected, atol=1e-3 * np.abs(expected).max())
    for path, other in (("mlp.switch_mlp.up_proj", "gate_proj"), ("mlp.gate_proj", "up_proj")):
        index = 3 if "switch" in path else 0
        names = (path, path.rpartition(".")[0] + "." + other)
        pair = [imatrix.factor(f"model.layers.{index}.{name}") for name in names]
        assert pair[0] == pair[1] is not None
    assert imatrix.factor("model.layers.0.self_attn.embed_q") is None


def test_gptq_converts_with_it(folder: Path, factors: Path, tmp_path: Path) -> None:
    """Of the same sizes, other bytes for experts alone; verify derives the same ones."""
    path = recipe(tmp_path, str(factors))
    made: list[dict[str, bytes]] = []
    for _ in range(2):
        opened = open_conversion(tiny_glm_path(), str(path), tmp_path / "build")
        convert_to_folder(opened, Quiet())
        made.append({p.name: p.read_bytes() for p in (tmp_path / "build").glob("*.safetensors")})
        path.write_text(path.read_text().replace('"search"', '"gptq"'))
    for shard, data in made[0].items():
        assert len(made[1][shard]) == len(data)
        assert (made[1][shard] != data) == (b".switch_mlp." in data)
    checked = verify(tmp_path / "build", tiny_glm_path(), samples=20)
    assert checked.rederived_blocks == 20
    path.write_text(path.read_text().replace(str(factors), str(folder)))
    with pytest.raises(RecipeError, match=r"importance alone, .* `glm-quant calibrate --factors`"):
        open_conversion(tiny_glm_path(), str(path), tmp_path / "other")


def test_changed_factor_is_refused(factors: Path, tmp_path: Path) -> None:
    """A factor with other bytes than were recorded is not used."""
    copy = shutil.copytree(factors, tmp_path / "imatrix")
    factor = Imatrix.open(copy).factor("model.layers.0.self_attn.o_proj")
    assert factor is not None
    data = bytearray(factor.file.read_bytes())
    data[-5] ^= 1
    factor.file.write_bytes(data)
    with pytest.raises(IntegrityError, match="the record says sha256"):
        factor.load()


def test_folder_that_is_none(tmp_path: Path, folder: Path, source: Checkpoint, text: Path) -> None:
    """A missing or changed imatrix is an error before anything starts; nothing is overwritten."""
    with pytest.raises(RecipeError, match=r"there is no whole imatrix here .*glm-quant calibrate"):
        open_conversion(tiny_glm_path(), str(recipe(tmp_path, str(tmp_path))), tmp_path / "build")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    batch = token_set(source, text)
    with pytest.raises(OutputError, match=r"holds something else \(notes\.txt\)"):
        calibrate(source, batch, tmp_path / "mine")
    assert ImatrixRecord.load(folder / "imatrix.json") is not None
