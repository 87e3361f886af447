"""How long `glm-quant convert` takes when everything is done already.

    uv run python -m tests.benchmarks.resume_time

A source of real dims, from a folder and from a Hub on loopback, is converted once; then the same
command is measured again. The promise is 5 seconds, so nothing may be hashed anew and no weights
fetched: the bytes that the Hub was asked for are reported.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.measuring import PROGRAM, measure
from tests.hub_server import HubServer
from tests.synthetic import real_config, write_checkpoint


def asked_bytes(hub: HubServer, since: int) -> int:
    """Return how many bytes of files were asked for since a request."""
    total = 0
    for request in hub.log[since:]:
        if request.path.startswith("/cdn/"):
            size = hub.blobs[request.path.removeprefix("/cdn/")].size
            begin, _, end = (request.range or "bytes=0-").removeprefix("bytes=").partition("-")
            total += min(size, int(end) + 1 if end else size) - int(begin)
    return total


def measured_again(
    source: str, recipe: str, output: Path, runs: int, environment: dict[str, str]
) -> dict[str, Any]:
    """Convert once, then measure the same command."""
    command = [PROGRAM, "convert", "--source", source, "--recipe", recipe, "--output", str(output)]
    first, _ = measure(command, environment)
    again = [measure(command, environment)[0] for _ in range(runs)]
    return {"first_s": round(first, 2), "again_s": round(statistics.median(again), 2)}


def main() -> None:
    """Measure and print one JSON value."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--recipe", default="uniform-4bit")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="default: a new one under the system's")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="resume-time-", dir=options.folder))
    try:
        source = work / "source"
        write_checkpoint(source, real_config(1, options.experts, dense=0), shard_bytes=1 << 30)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        folder = measured_again(str(source), options.recipe, work / "a" / "build", options.runs, {})
        shutil.rmtree(work / "a")
        with HubServer() as hub:
            hub.add_folder("org/real", source)
            place, output = "hf://org/real", work / "b" / "build"
            environment = {"HF_ENDPOINT": hub.url}
            remote = measured_again(place, options.recipe, output, options.runs, environment)
            since = len(hub.log)
            measured_again(place, options.recipe, output, 1, environment)
            remote["asked_bytes_each"] = asked_bytes(hub, since) // 2
        print(json.dumps({"source_bytes": size, "folder": folder, "hub": remote}, indent=2))
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
