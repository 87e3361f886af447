"""What `search` and `gptq` bring at equal bytes: weight error, KL divergence, perplexity and time.

    uv run python tests/benchmarks/search_quality.py --source PATH/tiny-glm --text PATH/held_out.txt

With `--imatrix`, calibrated variants too; `gptq` where `calibrate --factors` made it.

Each variant is a whole build under the demo's rules, streamed against its source in float32. Lower
weight error is not always lower KL, so KL on held-out text is what decides.
"""

import argparse
import json
import math
import tempfile
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.codes import encode
from glm_quant.codes.search import Search, quantize_search
from glm_quant.convert import convert_to_folder, open_conversion
from glm_quant.data import tiny_glm_path
from glm_quant.evaluation.divergence import divergence
from glm_quant.evaluation.token_set import make_token_set
from glm_quant.recipe import DivergenceSettings, load_recipe
from glm_quant.streaming.weights import PROJECTIONS, BuildWeights, SourceWeights

VARIANTS: dict[str, Search | None] = {
    "minmax": None,
    "plain squared error": Search(math.inf, magnitudes=False),
    "plain, slack 1.0": Search(1.0, magnitudes=False),
    "weighted, no bound": Search(math.inf),
    "weighted, slack 1.25": Search(1.25),
    "weighted, slack 1.1": Search(1.1),
    "weighted, slack 1.0": Search(1.0),
}


class Quiet:
    """Watches a conversion without a word."""

    def begin(self, stage: str) -> None:
        """Ignore the stage."""

    def move(self, stage: str, done: int, total: int) -> None:
        """Ignore the progress."""


# With `--imatrix`.
CALIBRATED: dict[str, Search | None] = {
    "calibrated, no bound": Search(math.inf),
    "calibrated, slack 1.25": Search(1.25),
    "calibrated, slack 1.0": Search(1.0),
    "calibrated, plain": Search(math.inf, magnitudes=False),
    "gptq, slack 1.0": Search(1.0),
}


def build(
    source: Path, folder: Path, bits: int, name: str, settings: Search | None, imatrix: str | None
) -> float:
    """Convert with experts in `bits`; returns the seconds that it took."""
    searching = "gptq" if name.startswith("gptq") else "search"
    recipe = load_recipe("demo")
    rules = [
        rule.model_dump(mode="json", exclude_defaults=True)
        | ({"bits": bits} if rule.group == "routed_experts" else {})
        for rule in recipe.rules
    ]
    text = {
        "name": "quality",
        "description": "one variant",
        "quantizer": "minmax" if settings is None else searching,
        "rules": rules,
    }
    if imatrix is not None:
        text["imatrix"] = imatrix
    path = folder.with_suffix(".yaml")
    path.write_text(json.dumps(text))
    if settings is not None:
        encode.quantize_search = partial(quantize_search, settings=settings)
    begin = time.perf_counter()
    convert_to_folder(open_conversion(source, str(path), folder), Quiet())
    return time.perf_counter() - begin


def experts_error(source: Checkpoint, folder: Path) -> tuple[float, float]:
    """Return squared error of the routed experts relative to their squares, and the gain."""
    whole, made = SourceWeights(source), BuildWeights(folder)
    off = size = along = 0.0
    for layer, sparse in enumerate(whole.args.sparse_layers):
        every = range(whole.args.n_routed_experts if sparse else 0)
        for (_, theirs), (_, ours) in zip(
            whole.experts(layer, every), made.experts(layer, every), strict=True
        ):
            for k in range(len(PROJECTIONS)):
                w, v = (np.array(m[k].astype(mx.float32), np.float64) for m in (theirs, ours))
                off += float(((v - w) ** 2).sum())
                along += float((v * w).sum())
                size += float((w**2).sum())
    return off / size, along / size


def main() -> None:
    """Print one line a variant."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--source", type=Path, default=tiny_glm_path())
    parser.add_argument("--text", type=Path, default=tiny_glm_path().with_name("held_out.txt"))
    parser.add_argument("--bits", type=int, default=2, help="of the routed experts")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1 << 15)
    parser.add_argument("--imatrix", help="made by `glm-quant calibrate` from other text")
    parser.add_argument("--only", help="variants whose name has this, beside minmax")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    options = parser.parse_args()
    source = Checkpoint.open(options.source)
    tokens = make_token_set(
        source,
        DivergenceSettings(
            texts={"held_out": str(options.text)}, tokens=options.tokens, context=options.context
        ),
    )
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        variants = VARIANTS | (CALIBRATED if options.imatrix else {})
        wanted = [n for n in variants if n == "minmax" or (options.only or "") in n]
        for number, name in enumerate(wanted):
            folder, settings = Path(scratch) / str(number), variants[name]
            imatrix = options.imatrix if name in CALIBRATED else None
            seconds = build(options.source, folder, options.bits, name, settings, imatrix)
            error, gain = experts_error(source, folder)
            found = divergence(source, folder, tokens, Path(scratch) / "divergence").row()
            if number == 0:
                print(f"{found.positions:,} positions, source {found.reference_perplexity.value}")
            rows[name] = {
                "expert_error": error,
                "gain": gain,
                "kl": found.mean_kl.value,
                "kl_error": found.mean_kl.standard_error or 0.0,
                "p99_kl": found.p99_kl,
                "top1": found.top1_agreement.value,
                "perplexity": found.build_perplexity.value,
                "nll_difference": found.nll_difference.value,
                "nll_difference_error": found.nll_difference.standard_error or 0.0,
                "seconds": seconds,
                "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            }
            row, base = rows[name], rows["minmax"]
            print(
                f"{name:22} error {error:.4f} ({error / base['expert_error'] - 1:+.1%}) gain "
                f"{gain:.3f} KL {row['kl']:.5f} ± {row['kl_error']:.5f} "
                f"({row['kl'] / base['kl'] - 1:+.1%}) 99 % {row['p99_kl']:.3f} top-1 "
                f"{row['top1']:.4f} perplexity {row['perplexity']:.3f} loss over the source's "
                f"{row['nll_difference']:.4f} ± {row['nll_difference_error']:.4f} "
                f"{row['bytes']:,} bytes {seconds:.1f} s",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
