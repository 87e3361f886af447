"""Converting against `mlx_lm.convert` and against the floor: wall time and peak memory.

    uv run python tests/benchmarks/convert_speed.py --experts 16 --pairs 3

The source is synthetic with GLM-5.2's real dims, uniform 4-bit, every layer with an indexer (stock
mlx-lm cannot load the real schedule). Both make the same tensors, which is checked byte by byte.
The floor is the slowest of reading the source, quantizing it on all cores and writing the output,
each alone. Runs alternate, files are in the system's cache for both, figures are medians.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np

from glm_quant.codes.affine import quantize_affine
from glm_quant.data import tiny_glm_path
from tests.benchmarks.measuring import measure
from tests.synthetic import real_config, write_checkpoint

OURS = "from flows.cli.main import main; main()"
THEIRS = (
    "import mlx.core as mx; mx.set_default_device(mx.cpu); "
    "from mlx_lm.convert import convert; import sys; "
    "convert(sys.argv[1], sys.argv[2], quantize=True, q_bits=4, q_group_size=64)"
)


def make_source(folder: Path, layers: int, experts: int) -> int:
    """Write the synthetic source; returns its bytes of weights."""
    config = real_config(layers, experts)
    config |= {"indexer_types": ["full"] * layers, "num_nextn_predict_layers": 0}
    write_checkpoint(folder, config)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_glm_path() / name, folder / name)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def same_tensors(ours: Path, theirs: Path) -> int:
    """Compare every tensor's bytes; returns how many there are."""
    tensors: dict[str, mx.array] = {}
    for path in ours.glob("*.safetensors"):
        tensors |= mx.load(str(path))  # pyright: ignore[reportOperatorIssue]
    count = 0
    for path in sorted(theirs.glob("*.safetensors")):
        for name, theirs_value in mx.load(str(path)).items():
            value = tensors.pop(name)
            if value.dtype != theirs_value.dtype or not mx.array_equal(value, theirs_value).item():
                raise SystemExit(f"{name} differs")
            count += 1
    if tensors:
        raise SystemExit(f"only ours has {sorted(tensors)[0]}")
    return count


def floors(source: Path, output: Path, work: Path) -> dict[str, float]:
    """Return seconds to read the source, quantize as much on all cores, write the output."""
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    begin = time.perf_counter()
    buffer = np.empty(32 << 20, np.uint8)
    for path in source.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.readinto(buffer.data):
                pass
    read = time.perf_counter() - begin

    block = np.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(np.float32)
    bits = (block.view(np.uint32) >> 16).astype(np.uint16).reshape(-1, 2048)

    def quantize(_: int) -> None:
        quantize_affine(bits, "BF16", 4, 64)

    quantize(0)  # compiles
    blocks = max(1, size // bits.nbytes)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        begin = time.perf_counter()
        list(pool.map(quantize, range(blocks)))
        quantized = (time.perf_counter() - begin) * size / (blocks * bits.nbytes)

    made = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    target = work / "written"
    begin = time.perf_counter()
    with target.open("wb") as file:
        for _ in range(made // buffer.nbytes):
            file.write(buffer.data)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter() - begin
    target.unlink()
    return {"read": read, "quantize": quantized, "write": written}


def main() -> None:
    """Run the pairs and print one JSON value."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder on the disk to measure")
    chosen = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="convert-speed-", dir=chosen.work))
    try:
        source, ours, theirs = work / "source", work / "ours", work / "theirs"
        size = make_source(source, chosen.layers, chosen.experts)
        convert = ["convert", "--source", str(source), "--recipe", "uniform-4bit"]
        our_command = [sys.executable, "-c", OURS, *convert, "--output", str(ours)]
        their_command = [sys.executable, "-c", THEIRS, str(source), str(theirs)]
        our_runs: list[tuple[float, int]] = []
        their_runs: list[tuple[float, int]] = []
        for _ in range(chosen.pairs):
            for folder in (ours, theirs, work / ".ours.glm-quant"):
                shutil.rmtree(folder, ignore_errors=True)
            our_runs.append(measure(our_command))
            their_runs.append(measure(their_command))
        tensors = same_tensors(ours, theirs)
        floor = floors(source, ours, work)

        def middle(runs: list[tuple[float, int]], which: int) -> float:
            return statistics.median(run[which] for run in runs)

        result = {
            "source_bytes": size,
            "equal_tensors": tensors,
            "ours": {"wall_s": middle(our_runs, 0), "peak_rss_bytes": middle(our_runs, 1)},
            "mlx_lm": {"wall_s": middle(their_runs, 0), "peak_rss_bytes": middle(their_runs, 1)},
            "wall_ratio": statistics.median(
                a[0] / b[0] for a, b in zip(our_runs, their_runs, strict=True)
            ),
            "rss_ratio": statistics.median(
                a[1] / b[1] for a, b in zip(our_runs, their_runs, strict=True)
            ),
            "floor_s": floor,
            "ratio_to_floor": middle(our_runs, 0) / max(floor.values()),
        }
        print(json.dumps(result, indent=2))
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
