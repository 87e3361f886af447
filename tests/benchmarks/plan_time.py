"""How long planning GLM-5.2 takes, from its real config and index (59,585 tensors, 282 shards).

    uv run python -m tests.benchmarks.plan_time

Reported: `glm-quant plan --json` as a process, and what of it is reading and planning in a process
that has imported everything. Medians; the promise is 3 seconds for the process.
"""

import argparse
import json
import lzma
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from glm_quant.checkpoint.index import INDEX_NAME
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.quantize.plan import make_plan
from glm_quant.recipe import load_recipe
from tests.benchmarks.measuring import PROGRAM, measure

FIXTURES = Path(__file__).parents[1] / "fixtures" / "glm-5.2"


def main() -> None:
    """Measure and print one JSON value."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="dynamic-2.56bpw")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="plan-time-") as folder:
        release = Path(folder)
        shutil.copy(FIXTURES / "config.json", release)
        packed = (FIXTURES / f"{INDEX_NAME}.xz").read_bytes()
        (release / INDEX_NAME).write_bytes(lzma.decompress(packed))
        command = [PROGRAM, "plan", "--source", folder, "--recipe", options.recipe, "--json"]
        processes = [measure(command) for _ in range(options.runs)]
        inside: list[float] = []
        for _ in range(options.runs):
            begin = time.perf_counter()
            plan = make_plan(Checkpoint.open(release), load_recipe(options.recipe))
            inside.append(time.perf_counter() - begin)
    report = {
        "output_shards": len(plan.shards),
        "tensor_bytes": plan.tensor_bytes,
        "process_s": round(statistics.median(run[0] for run in processes), 2),
        "peak_rss_gb": round(max(run[1] for run in processes) / 1e9, 3),
        "reading_and_planning_s": round(statistics.median(inside), 2),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
