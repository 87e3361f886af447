"""llama.cpp's imatrix: read and written, with llama.cpp's own reader, writer and names."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from glm_quant.calibration.calibrate import calibrate
from glm_quant.calibration.llama_cpp import read_llama_cpp, write_llama_cpp
from glm_quant.checkpoint.imatrix import Imatrix
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.data import tiny_glm_path
from glm_quant.errors import IntegrityError, OutputError, RecipeError
from glm_quant.fit.text import fit_tokens

WIDTH, EXPERTS = 64, 12


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imatrix folder of the small checkpoint."""
    folder = tmp_path_factory.mktemp("imatrix") / "ours"
    source = Checkpoint.open(tiny_glm_path())
    calibrate(source, fit_tokens(source, None, 512, 64), folder)
    return folder


def llama_cpp_file(path: Path, *, broken: float | None = None, kind: str = "imatrix") -> Path:
    """What `llama-imatrix` writes, by llama.cpp's own writer."""
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "any")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["wiki.train.raw"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, units in (("ffn_down_exps", EXPERTS), ("attn_q_a", 1), ("indexer.proj", 1)):
        squares = rng.uniform(1, 9, (units, WIDTH)).astype(np.float32)
        counts = np.full((units, 1), 100, np.float32)
        counts[-1] = 3 if units > 1 else 3584
        if broken is not None:
            squares[0, 0] = broken
        writer.add_tensor(f"blk.1.{name}.weight.in_sum2", squares)
        writer.add_tensor(f"blk.1.{name}.weight.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_ours_reads_back_by_llama_cpp_s_reader(ours: Path, tmp_path: Path) -> None:
    """Each weight has the name that llama.cpp gives it, its proportions and its counts."""
    file = tmp_path / "ours.gguf"
    result = CliRunner().invoke(app, ["imatrix", str(ours), str(file)])
    assert result.exit_code == 0, result.output
    reader = gguf.GGUFReader(file)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert "general.architecture" not in reader.fields
    arrays = {tensor.name: tensor.data for tensor in reader.tensors}
    imatrix = Imatrix.open(ours)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM_DSA, 5)
    theirs = {".embed_q": ".k_b_proj", ".unembed_out": ".v_b_proj", ".switch_mlp.": ".experts."}
    for path, weight in imatrix.record.weights.items():
        spelled = path
        for mine, other in theirs.items():
            spelled = spelled.replace(mine, other)
        name = f"{names.get_name(spelled)}.weight"
        squares, counts = arrays.pop(f"{name}.in_sum2"), arrays.pop(f"{name}.counts")
        importance = imatrix.importance(path)
        assert importance is not None
        expected = importance.of_rows(0, weight.units, weight.units)
        assert counts.shape == (len(squares), 1)
        np.testing.assert_allclose(
            squares / counts, np.broadcast_to(expected, squares.shape), rtol=1e-6
        )
        if ".switch_mlp." in path:
            met = imatrix.record.coverage[int(path.split(".")[2])]
            np.testing.assert_array_equal(counts[:, 0], np.maximum(met, 1))
    assert not arrays


def test_round_trip(ours: Path, tmp_path: Path) -> None:
    """What we write and read again is what it was, and writes to the same bytes."""
    write_llama_cpp(ours, tmp_path / "a.gguf")
    read_llama_cpp(tmp_path / "a.gguf", tmp_path / "back")
    before, after = Imatrix.open(ours), Imatrix.open(tmp_path / "back")
    assert set(before.record.weights) == set(after.record.weights)
    for path in before.record.weights:
        one, two = before.importance(path), after.importance(path)
        assert one is not None
        assert two is not None
        if ".switch_mlp." in path:
            continue  # thin experts have the mean of their layer's importance, not of its sums
        expected = one.of_rows(0, one.units, one.units)
        made = two.of_rows(0, two.units, two.units)
        np.testing.assert_allclose(made, np.broadcast_to(expected, made.shape), rtol=1e-5)
    write_llama_cpp(ours, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_a_file_of_llama_cpp_becomes_a_folder(tmp_path: Path) -> None:
    """Means of the counted tokens; an expert that met few has its layer's; others are left out."""
    file = llama_cpp_file(tmp_path / "theirs.gguf")
    result = CliRunner().invoke(app, ["imatrix", str(file), str(tmp_path / "folder")])
    assert result.exit_code == 0, result.output
    imatrix = Imatrix.open(tmp_path / "folder")
    assert imatrix.record.tokens == 7 * 512
    down = "model.layers.1.mlp.switch_mlp.down_proj"
    assert set(imatrix.record.weights) == {down, "model.layers.1.self_attn.q_a_proj"}
    assert imatrix.record.weights[down].thin == 1
    importance = imatrix.importance(down)
    assert importance is not None
    values = importance.of_rows(0, EXPERTS, EXPERTS)
    squares = next(
        tensor.data
        for tensor in gguf.GGUFReader(file).tensors
        if tensor.name == "blk.1.ffn_down_exps.weight.in_sum2"
    )
    np.testing.assert_allclose(values[0], squares[0] / squares[0].mean(), rtol=1e-6)
    np.testing.assert_allclose(values[-1], squares.sum(0) / squares.sum(0).mean(), rtol=1e-6)


def test_what_is_none_is_refused(ours: Path, tmp_path: Path) -> None:
    """Each with a message that says which file, why, and what to do."""
    (tmp_path / "old.dat").write_bytes(b"\x03\x00\x00\x00" + bytes(100))
    with pytest.raises(RecipeError, match=r"old\.dat: this is no imatrix.*--output-format gguf"):
        read_llama_cpp(tmp_path / "old.dat", tmp_path / "x")
    whole = llama_cpp_file(tmp_path / "whole.gguf").read_bytes()
    for cut in (30, 200, len(whole) - 200):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(RecipeError, match=r"cut\.gguf: this is no imatrix"):
            read_llama_cpp(tmp_path / "cut.gguf", tmp_path / "x")
    with pytest.raises(RecipeError, match=r"general\.type is model"):
        read_llama_cpp(llama_cpp_file(tmp_path / "m.gguf", kind="model"), tmp_path / "x")
    for number, bad in enumerate((np.nan, np.inf, -1.0)):
        file = llama_cpp_file(tmp_path / f"{number}.gguf", broken=bad)
        with pytest.raises(IntegrityError, match=r"blk\.1\.ffn_down_exps\.weight\.in_sum2"):
            read_llama_cpp(file, tmp_path / "x")
    with pytest.raises(OutputError, match="Choose an empty one"):
        read_llama_cpp(tmp_path / "whole.gguf", ours)
    with pytest.raises(OutputError, match="is there already"):
        write_llama_cpp(ours, tmp_path / "whole.gguf")
    assert not (tmp_path / "x").exists()
