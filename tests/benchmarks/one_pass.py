"""One pass that calibrates, makes the reference and converts, against three that do one each.

    uv run python -m tests.benchmarks.one_pass --runs 3

The small checkpoint comes from a Hub on loopback, through the real client, in a process that has
compiled its loops before. Reported, as medians over the runs: the bytes of shards that were sent
(headers, which every process reads again, are left out), wall seconds, and the ratio of the two
ways. `--rate` bounds the line, in bytes a second and connection. Server and client share the cores.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm_quant.build import Build, BuildSpec
from glm_quant.calibration.build_calibration import calibrate_build, imatrix_folder
from glm_quant.data import tiny_glm_path
from glm_quant.evaluation.divergence import reference_batch
from glm_quant.evaluation.token_set import make_token_set
from glm_quant.memory import half_of_memory
from glm_quant.quantize.convert import Conversion
from glm_quant.quantize.plan import make_plan
from glm_quant.streaming.forward import stream_batches
from glm_quant.streaming.weights import SourceWeights
from tests.hub_server import HubServer
from tests.plain import PLAIN

REPO = "org/source"


def write_recipe(folder: Path, tokens: int) -> str:
    """Write a recipe for `gptq`; returns its path."""
    rules = Path(PLAIN).read_text().replace("quantizer: search", "quantizer: gptq")
    sizes = f"{{tokens: {tokens}, context: 128}}"
    path = folder / "recipe.yaml"
    path.write_text(f"{rules}calibration: {sizes}\ndivergence: {sizes}\n")
    return str(path)


def nothing(_done: int, _total: int) -> None:
    """See no progress."""


def convert(build: Build, conversion: Conversion) -> None:
    """Make all output shards."""
    with conversion as working:
        for shard in range(len(build.plan.shards)):
            working.complete(shard)


def together(spec: BuildSpec) -> None:
    """Do it in one pass, as `glm-quant run` does."""
    build = Build(spec)
    build.workspace.create()
    calibrate_build(
        build.checkpoint,
        build.recipe,
        build.workspace,
        nothing,
        reference=True,
        converting=build.conversion,
    )
    plan = make_plan(build.checkpoint, build.recipe, imatrix_folder(build.workspace))
    convert(build, Conversion(build.checkpoint, plan, build.workspace))


def apart(spec: BuildSpec) -> None:
    """Calibrate, make the reference, convert: one after the other."""
    build = Build(spec)
    build.workspace.create()
    calibrate_build(build.checkpoint, build.recipe, build.workspace, nothing)
    tokens = make_token_set(build.checkpoint, build.recipe.divergence)
    memory = half_of_memory() // 2
    with reference_batch(build.checkpoint, tokens, build.workspace.divergence, memory) as batch:
        if batch is not None:
            stream_batches(SourceWeights(build.checkpoint), [batch])
    plan = make_plan(build.checkpoint, build.recipe, imatrix_folder(build.workspace))
    convert(build, Conversion(build.checkpoint, plan, build.workspace))


def sent_bytes(hub: HubServer) -> int:
    """Return the bytes of shards that were asked for, without headers."""
    total = 0
    for request in hub.requests(r"^/cdn/.*\.safetensors$"):
        begin, _, end = (request.range or "").removeprefix("bytes=").partition("-")
        if request.range is None:
            total += hub.head(REPO)[request.file].size
        elif begin != "0":
            total += int(end) - int(begin) + 1
    return total


def measure(hub: HubServer, way: Callable[[BuildSpec], None], recipe: str) -> tuple[int, float]:
    """Return the bytes sent and the seconds of a build that is made one way."""
    with tempfile.TemporaryDirectory(prefix="one-pass-") as work:
        spec = BuildSpec(recipe=recipe, source=f"hf://{REPO}", workspace=work + "/work")
        hub.log.clear()
        begin = time.perf_counter()
        way(spec)
        return sent_bytes(hub), time.perf_counter() - begin


def compare(runs: int, tokens: int, rate: float | None) -> dict[str, Any]:
    """Return what was measured."""
    ways = {"one_pass": together, "apart": apart}
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in ways}
    with HubServer() as hub, tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        hub.add_folder(REPO, tiny_glm_path())
        recipe = write_recipe(Path(folder), tokens)
        measure(hub, together, recipe)  # compiles
        hub.rate = rate
        for _ in range(runs):
            for name, way in ways.items():
                found[name].append(measure(hub, way, recipe))
        source = sum(
            content.size for name, content in hub.head(REPO).items() if name.endswith("safetensors")
        )
    report: dict[str, Any] = {"source_mb": round(source / 1e6, 3), "runs": runs}
    medians = {
        name: tuple(statistics.median(values) for values in zip(*results, strict=True))
        for name, results in found.items()
    }
    for name, (size, seconds) in medians.items():
        report[name] = {
            "sent_mb": round(size / 1e6, 3),
            "of_source": round(size / source, 3),
            "seconds": round(seconds, 2),
            "all_seconds": [round(each[1], 2) for each in found[name]],
        }
    one, other = medians["one_pass"], medians["apart"]
    report["ratio"] = {"sent": round(one[0] / other[0], 3), "seconds": round(one[1] / other[1], 3)}
    return report


def main() -> None:
    """Measure and print one JSON value."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512, help="of each text")
    parser.add_argument("--rate", type=float, help="bytes a second and connection; default: none")
    options = parser.parse_args()
    print(json.dumps(compare(options.runs, options.tokens, options.rate), indent=2))


if __name__ == "__main__":
    main()
