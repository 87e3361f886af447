"""Recipes side by side: bytes, KL divergence and perplexity, each against the source itself.

    uv run python tests/benchmarks/recipe_quality.py demo fitted.yaml --source PATH/tiny-glm

Meant for what `glm-quant fit` wrote: equal bytes and lower KL on held-out text is what it promises.
With `--slices` on the four built-in slices instead of one text. Each recipe after the first has its
difference to the first too, sequence by sequence.
"""

import argparse
import tempfile
import time
from pathlib import Path

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.convert import convert_to_folder, open_conversion
from glm_quant.data import tiny_glm_path
from glm_quant.evaluation.divergence import build_folder, divergence
from glm_quant.evaluation.divergence_beside import compare_divergence
from glm_quant.evaluation.divergence_record import DivergenceRecord
from glm_quant.evaluation.token_set import make_token_set
from glm_quant.recipe import DivergenceSettings
from tests.benchmarks.search_quality import Quiet


def main() -> None:
    """Print one line a recipe."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--source", type=Path, default=tiny_glm_path())
    parser.add_argument("--text", type=Path, default=tiny_glm_path().with_name("held_out.txt"))
    parser.add_argument("--slices", action="store_true", help="the built-in slices, not --text")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1 << 12)
    options = parser.parse_args()
    source = Checkpoint.open(options.source)
    texts = None if options.slices else {"held_out": str(options.text)}
    settings = DivergenceSettings(texts=texts, tokens=options.tokens, context=options.context)
    tokens = make_token_set(source, settings)
    with tempfile.TemporaryDirectory() as scratch:
        first: tuple[DivergenceRecord, Path] | None = None
        for number, recipe in enumerate(options.recipes):
            folder = Path(scratch) / str(number)
            begin = time.perf_counter()
            made = convert_to_folder(open_conversion(options.source, recipe, folder), Quiet())
            converted = time.perf_counter()
            beside = Path(scratch) / "divergence"
            record = divergence(source, folder, tokens, beside)
            found = record, build_folder(beside, record)
            first = first or found
            row = record.row()
            print(
                f"{recipe}: {made.tensor_bytes:,} bytes of tensors, KL {row.mean_kl.value:.5f} ± "
                f"{row.mean_kl.standard_error or 0:.5f}, top-1 {row.top1_agreement.value:.4f}, "
                f"perplexity {row.build_perplexity.value:.3f} "
                f"(source {row.reference_perplexity.value:.3f}); calibrated and "
                f"converted in {converted - begin:.1f} s",
                flush=True,
            )
            if found is not first:
                for each in compare_divergence(options.recipes[0], found, first):
                    if each.measure.partition("/")[0] == "mean_kl":
                        print(
                            f"  {each.measure} less that of {each.baseline}: "
                            f"{each.difference:+.5f} ± {each.standard_error or 0:.5f} "
                            f"({each.pairs} sequences)",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
