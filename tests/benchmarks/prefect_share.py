"""What does Prefect cost? A whole run with 46 output shards, and the seconds that its stages took.

    uv run python -m tests.benchmarks.prefect_share

The shipped checkpoint, cut into as many outputs as GLM-5.2's build has, through every stage, at a
server with a fresh database. A stage measures its own seconds; what the flow takes beyond their sum
is Prefect's: states, results, artifacts, logs. Starting processes counts for neither.
"""

import argparse
import json
import re
import tempfile
import time
from pathlib import Path

import httpx

from glm_quant.build import Build, BuildSpec
from glm_quant.data import tiny_glm_path
from tests.e2e.command_line import CommandLine
from tests.e2e.conftest import QUICK
from tests.e2e.service import Server


def cut_into(shards: int, folder: Path) -> Path:
    """Write a quick recipe, of 8 bits for its small source, whose output has so many shards."""
    path = folder / "many.yaml"
    wide = re.sub(r"bits: \d", "bits: 8", QUICK)
    for size in range(66_000, 400_000, 2_000):
        path.write_text(re.sub(r"shard_bytes: \S+", f"shard_bytes: {size}", wide))
        spec = BuildSpec(recipe=str(path), source=str(tiny_glm_path()), workspace=str(folder / "w"))
        if len(Build(spec).plan.shards) == shards:
            return path
    raise SystemExit(f"no size gives {shards} shards")


def main() -> None:
    """Run once and print one JSON value."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=46)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prefect-share-") as name:
        folder = Path(name)
        recipe = cut_into(options.shards, folder)
        server = Server(CommandLine(folder / "prefect"))
        server.start()
        try:
            begin = time.perf_counter()
            done = server.command_line.run(
                *("run", recipe, "--source", tiny_glm_path(), "--workspace", folder / "w"),
                *("--publish", folder / "published", "--json"),
            )
            wall = time.perf_counter() - begin
            answer = httpx.post(f"{server.api}/flow_runs/filter", json={}, timeout=60)
            [run] = answer.json()
        finally:
            server.kill()
    stages = sum(result["seconds"] for result in json.loads(done.stdout)["stages"])
    flow = run["total_run_time"]
    print(
        json.dumps(
            {
                "shards": options.shards,
                "process_s": round(wall, 1),
                "flow_s": round(flow, 1),
                "stages_s": round(stages, 1),
                "prefect_s": round(flow - stages, 1),
                "prefect_share": round((flow - stages) / flow, 3),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
