"""What does showing progress cost? Whole runs with 46 output shards, with and without, in turn.

    uv run python -m tests.benchmarks.progress_cost

The shipped checkpoint goes through every stage at one server, each time in a fresh process and
workspace. Without progress a stage's reports go nowhere and no artifact is sent. Beside the seconds
of the flow stand the process's seconds of CPU, which other work on the machine moves less.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from glm_quant.build import BuildSpec
from glm_quant.data import tiny_glm_path
from tests.benchmarks.prefect_share import cut_into
from tests.e2e.command_line import CommandLine
from tests.e2e.service import Server


def run_once(recipe: str, workspace: str, shown: bool) -> None:
    """Run the flow in this process and print what it took."""
    from flows.environment import prepare

    prepare()
    import tasks.session
    import tasks.stage_task
    from flows.release import release

    if not shown:

        @contextmanager
        def nothing(_: Sequence[str]) -> Generator[None]:
            yield

        tasks.session.progress_shown = nothing
        tasks.stage_task.progress_of = lambda _: lambda *_: None
    spec = BuildSpec(
        recipe=recipe,
        source=str(tiny_glm_path()),
        workspace=workspace,
        targets=(f"{workspace}/published/build",),
    )
    begin, used = time.perf_counter(), os.times()
    release(spec)
    now = os.times()
    cpu = now.user + now.system - used.user - used.system
    print(json.dumps({"wall_s": time.perf_counter() - begin, "cpu_s": cpu}))


def measure(shards: int, pairs: int) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Return what runs with and without progress took, in pairs whose order turns."""
    found: list[tuple[dict[str, float], dict[str, float]]] = []
    with tempfile.TemporaryDirectory(prefix="progress-cost-") as name:
        folder = Path(name)
        recipe = cut_into(shards, folder)
        server = Server(CommandLine(folder / "prefect"))
        server.start()
        try:
            for pair in range(pairs + 1):
                took: dict[bool, dict[str, float]] = {}
                for shown in (pair % 2 == 0, pair % 2 == 1):
                    once = str(recipe), str(folder / f"{pair}-{shown}"), str(int(shown))
                    done = subprocess.run(
                        [sys.executable, "-m", "tests.benchmarks.progress_cost", "--once", *once],
                        env=server.command_line.environment,
                        stdout=subprocess.PIPE,
                        check=True,
                    )
                    took[shown] = json.loads(done.stdout.splitlines()[-1])
                found.append((took[True], took[False]))
        finally:
            server.kill()
    return found[1:]  # the first pair warms caches


def main() -> None:
    """Run pairs and print one JSON value."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=46)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--once", nargs=3, help="recipe, workspace and 1 or 0: what a child does")
    options = parser.parse_args()
    if options.once:
        recipe, workspace, shown = options.once
        run_once(recipe, workspace, shown == "1")
        return
    pairs = measure(options.shards, options.pairs)
    result: dict[str, object] = {"shards": options.shards, "pairs": options.pairs}
    for what in ("wall_s", "cpu_s"):
        ratios = [with_it[what] / without[what] for with_it, without in pairs]
        result[what] = {
            "with": round(statistics.median(with_it[what] for with_it, _ in pairs), 2),
            "without": round(statistics.median(without[what] for _, without in pairs), 2),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "median_ratio": round(statistics.median(ratios), 3),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
