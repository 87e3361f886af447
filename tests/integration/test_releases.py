"""The kinds of release that exist: FP8 with block scales, float16, GLM-5.1 without a schedule."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from glm_quant.checkpoint.index import INDEX_NAME
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import CheckpointError, MissingTensorError, ShapeError, WeightError
from glm_quant.quantize.plan import make_plan
from glm_quant.quantize.verify import verify
from glm_quant.recipe import Recipe
from tests.conftest import Edit, Made
from tests.synthetic import small_config, write_checkpoint

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def save(folder: Path, config: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    """Write a checkpoint in two shards, scales in the other one for some weights."""
    folder.mkdir()
    names = sorted(arrays)
    split = names[len(names) // 2 | 1]  # between some weight and its scales, or near it
    shards = [{n: arrays[n] for n in names if (n < split) == first} for first in (True, False)]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        mx.save_safetensors(str(folder / name), shard)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def arrays_of(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= mx.load(str(path))  # type: ignore[operator]
    return found


def to_fp8(weight: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return codes and scales of a weight, and the weight that mlx-lm makes of them."""
    rows, columns = weight.shape
    padded = mx.pad(weight.astype(mx.float32), ((0, -rows % 128), (0, -columns % 128)))
    blocks = padded.reshape(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
    scales = mx.maximum(mx.max(mx.abs(blocks), axis=(1, 3)), 1e-8) / 448
    codes = mx.to_fp8(blocks / scales[:, None, :, None]).reshape(padded.shape)
    wide = mx.from_fp8(codes, dtype=mx.bfloat16).reshape(blocks.shape)
    back = (wide * scales[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return codes[:rows, :columns], scales, back.astype(mx.bfloat16)


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Give an FP8 checkpoint, and the bfloat16 one that mlx-lm reads out of it."""
    root = tmp_path_factory.mktemp("fp8")
    config = small_config(3, 4) | {"num_nextn_predict_layers": 0, "hidden_size": 320}
    write_checkpoint(root / "plain", config)
    coded: dict[str, mx.array] = {}
    wide: dict[str, mx.array] = {}
    for name, array in arrays_of(root / "plain").items():
        coded[name] = wide[name] = array
        quantized = (".experts." in name or "_proj.weight" in name) and "weights_proj" not in name
        if quantized and array.ndim == 2:
            coded[name], coded[f"{name}_scale_inv"], wide[name] = to_fp8(array)
    mx.eval(coded, wide)
    save(root / "wide", config, wide)
    save(root / "coded", config | {"quantization_config": FP8}, coded)
    as_fp8(root / "coded")
    return root / "coded", root / "wide"


def as_fp8(folder: Path) -> None:
    """Say F8_E4M3 in the headers where mlx, which has no such dtype, said U8."""
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        for entry in header.values():
            if entry and entry.get("dtype") == "U8":
                entry["dtype"] = "F8_E4M3"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_fp8_release_equals_what_mlx_lm_reads(
    releases: tuple[Path, Path], tmp_path: Path, demo_recipe: Recipe, prepare: Callable[..., Made]
) -> None:
    """An FP8 source gives the very bytes of the bfloat16 checkpoint that mlx-lm makes of it."""
    coded, wide = releases
    built = [
        prepare(source, tmp_path / source.name, demo_recipe.model_copy(), 2)
        for source in (coded, wide)
    ]
    for made in built:
        made.complete_all()
        made.assemble()
    one, other = built
    assert [p.read_bytes() for p in one.shard_files] == [p.read_bytes() for p in other.shard_files]
    config = json.loads((one.output / "config.json").read_bytes())
    assert config == json.loads((other.output / "config.json").read_bytes())
    assert one.plan.warnings
    assert "FP8 release" in one.plan.warnings[0]
    assert verify(one.output, coded, samples=200).rederived_blocks > 50


def test_zero_fp8_weight(
    releases: tuple[Path, Path],
    tmp_path: Path,
    demo_recipe: Recipe,
    prepare: Callable[..., Made],
    edit_tensor: Callable[[Path, str, Edit], str],
) -> None:
    """Codes that are all zero stop the conversion, whatever their scales are."""
    broken = tmp_path / "broken"
    shutil.copytree(releases[0], broken)
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    shard = edit_tensor(broken, name, lambda values: values.fill(0))
    made = prepare(broken, tmp_path / "w", demo_recipe)
    with pytest.raises(WeightError, match=rf"{shard}: tensor {name} .*is all zero"):
        made.complete_all()


def test_fp8_tensor_reads_as_bfloat16(releases: tuple[Path, Path]) -> None:
    """Whoever reads a source tensor, as parity does, sees the bfloat16 weight; rows of it too."""
    coded, wide = (Checkpoint.open(folder) for folder in releases)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert coded.tensors[name].dtype == "F8_E4M3"
    assert mx.array_equal(coded.read(name), wide.read(name)).item()
    for first, count in ((0, 130), (130, 190)):
        some = coded.read_at(coded.tensors[name].rows(first, count))
        assert mx.array_equal(some, wide.read(name)[first : first + count]).item()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, CheckpointError, "quant_method 'gptq'"),
        ({"quantization_config": {**FP8, "weight_block_size": [64, 64]}}, CheckpointError, "64"),
        ({"quantization": {"bits": 4}}, CheckpointError, "quantized for MLX already"),
    ],
)
def test_other_quantized_sources_are_refused(
    small_copy: Path, demo_recipe: Recipe, change: dict[str, Any], error: type, said: str
) -> None:
    """A source that is quantized in another way is told at planning."""
    config = json.loads((small_copy / "config.json").read_bytes())
    (small_copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(error, match=said):
        make_plan(Checkpoint.open(small_copy), demo_recipe)


def test_fp8_weight_without_scales(
    releases: tuple[Path, Path], tmp_path: Path, demo_recipe: Recipe
) -> None:
    """FP8 codes without their scales, or with scales of another shape, are named."""
    name = "model.layers.1.self_attn.o_proj.weight"
    arrays = arrays_of_coded(releases[0])
    config = json.loads((releases[0] / "config.json").read_bytes())
    scales = arrays.pop(f"{name}_scale_inv")
    save(tmp_path / "without", config, arrays)
    as_fp8(tmp_path / "without")
    with pytest.raises(MissingTensorError, match=f"tensor {name} is F8_E4M3, but there is no"):
        make_plan(Checkpoint.open(tmp_path / "without"), demo_recipe)
    save(tmp_path / "odd", config, arrays | {f"{name}_scale_inv": scales[:1]})
    as_fp8(tmp_path / "odd")
    with pytest.raises(ShapeError, match="is needed for a weight of"):
        make_plan(Checkpoint.open(tmp_path / "odd"), demo_recipe)


def arrays_of_coded(folder: Path) -> dict[str, mx.array]:
    """Read an FP8 checkpoint with the codes as U8."""
    checkpoint = Checkpoint.open(folder)
    found: dict[str, mx.array] = {}
    for name, info in checkpoint.tensors.items():
        if info.dtype == "F8_E4M3":
            data = checkpoint.source.read(info.shard, info.begin, info.end)
            found[name] = mx.array(np.frombuffer(data, np.uint8).reshape(info.shape))
        else:
            found[name] = checkpoint.read(name)
    return found


def test_float16_release(tmp_path: Path, demo_recipe: Recipe, prepare: Callable[..., Made]) -> None:
    """A float16 source keeps its dtype in scales, biases and stored weights."""
    config = small_config(2, 4) | {"num_nextn_predict_layers": 0, "dtype": "float16"}
    write_checkpoint(tmp_path / "plain", config)
    arrays = {
        name: array if array.dtype == mx.float32 else array.astype(mx.float16)
        for name, array in arrays_of(tmp_path / "plain").items()
    }
    save(tmp_path / "half", config, arrays)
    made = prepare(tmp_path / "half", tmp_path / "w", demo_recipe)
    made.complete_all()
    made.assemble()
    dtypes = {name.rpartition(".")[2]: a.dtype for name, a in arrays_of(made.output).items()}
    assert dtypes["scales"] == dtypes["biases"] == mx.float16
    verify(made.output, tmp_path / "half")


def test_glm_5_1_has_an_indexer_everywhere(
    tmp_path: Path, demo_recipe: Recipe, prepare: Callable[..., Made]
) -> None:
    """A config without indexer_types and without frequency gives every layer its indexer."""
    config = small_config(3, 4)
    for key in ("indexer_types", "index_topk_freq", "index_skip_topk_offset"):
        del config[key]
    write_checkpoint(tmp_path / "source", config)
    made = prepare(tmp_path / "source", tmp_path / "w", demo_recipe)
    made.complete_all()
    made.assemble()
    names = {tensor.name for tensor in made.plan.tensors}
    assert all(f"model.layers.{i}.self_attn.indexer.wk.weight" in names for i in range(3))
    verify(made.output, tmp_path / "source")
