"""Does memory grow with the source? `glm-quant convert` of a small and a large one of real dims.

    uv run python -m tests.benchmarks.growth --experts 8 208

Both come from a Hub on loopback that makes their bytes while it sends them; 8 experts are 4.9 GB to
fetch, 208 are 20 GB. Reported for each: what was fetched, wall time, peak memory; and how the peaks
compare (the promise: within 5 %, and at most 1 GB).
"""

import argparse
import json
from pathlib import Path

from tests.benchmarks.hub_conversion import convert_virtual


def main() -> None:
    """Convert both and print one JSON value."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 208])
    parser.add_argument("--window", type=int, default=2)
    parser.add_argument("--recipe", default="uniform-4bit")
    parser.add_argument("--shard-gib", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="default: a new one under the system's")
    options = parser.parse_args()
    runs = [
        convert_virtual(experts, options.window, options.recipe, options.shard_gib, options.folder)
        for experts in options.experts
    ]
    first, last = runs[0]["peak_rss_gb"], runs[-1]["peak_rss_gb"]
    print(json.dumps({"runs": runs, "growth": round(last / first - 1, 4)}, indent=2))


if __name__ == "__main__":
    main()
