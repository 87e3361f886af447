"""What `search` brings at equal bytes: weight error, KL divergence, perplexity and time.

    uv run python tests/benchmarks/search_quality.py --source PATH/tiny-glm --text PATH/held_out.txt

Each variant is a whole build under the demo's rules. The runtime runs the weights that its codes
stand for in float32, so that only their values differ from the source's. KL is to the source, over
windows of held-out text: lower weight error is not always lower KL, so the last is what decides.
The source must fit into memory.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.parity.candidate import load_shard, load_unquantized, logits_of
from glm_quant.parity.measures import kl_divergence, log_softmax, top1_agreement
from glm_quant.quantize import encode
from glm_quant.quantize.command import convert_to_folder, open_conversion
from glm_quant.quantize.search import Search, quantize_search
from glm_quant.recipe import load_recipe
from glm_quant.testbed import tiny_glm_path

VARIANTS: dict[str, Search | None] = {
    "minmax": None,
    "search, plain squared error": Search(math.inf, magnitudes=False),
    "search, plain, slack 1.0": Search(1.0, magnitudes=False),
    "search, no bound": Search(math.inf),
    "search, slack 1.25": Search(1.25),
    "search, slack 1.1": Search(1.1),
    "search, slack 1.0": Search(1.0),
}


class Quiet:
    """Watches a conversion without a word."""

    def begin(self, stage: str) -> None:
        """Ignore the stage."""

    def move(self, stage: str, done: int, total: int) -> None:
        """Ignore the progress."""


def build(source: Path, folder: Path, bits: int, settings: Search | None) -> float:
    """Convert with experts in `bits`; returns the seconds that it took."""
    recipe = load_recipe("demo")
    rules = [
        rule.model_dump(mode="json", exclude_defaults=True)
        | ({"bits": bits} if rule.group == "routed_experts" else {})
        for rule in recipe.rules
    ]
    text = {
        "name": "quality",
        "description": "one variant",
        "quantizer": "minmax" if settings is None else "search",
        "rules": rules,
    }
    path = folder.with_suffix(".yaml")
    path.write_text(json.dumps(text))
    if settings is not None:
        encode.quantize_search = partial(quantize_search, settings=settings)
    begin = time.perf_counter()
    convert_to_folder(open_conversion(source, str(path), folder), Quiet())
    return time.perf_counter() - begin


def windows(source: Path, text: Path, length: int, count: int) -> list[np.ndarray]:
    """Return windows of token ids that do not overlap."""
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    ids = tokenizer.encode(text.read_text(), add_special_tokens=False).ids
    return [
        np.array(ids[i * length : (i + 1) * length]) for i in range(min(count, len(ids) // length))
    ]


def dequantized(source: Path, folder: Path) -> Any:
    """Return the runtime with the weights that a build's codes stand for, in float32."""
    stored: dict[str, mx.array] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        stored |= load_shard(shard)
    schemes = json.loads((folder / "config.json").read_text())["quantization"]
    weights = {k: v for k, v in stored.items() if not k.endswith((".scales", ".biases"))}
    for path, scheme in schemes.items():
        if isinstance(scheme, dict):
            weights[f"{path}.weight"] = mx.dequantize(
                stored[f"{path}.weight"],
                stored[f"{path}.scales"].astype(mx.float32),
                stored[f"{path}.biases"].astype(mx.float32),
                group_size=scheme["group_size"],
                bits=scheme["bits"],
            )
    model = load_unquantized(source, folder)
    model.load_weights([(k, v.astype(mx.float32)) for k, v in weights.items()], strict=True)
    mx.eval(model.parameters())
    return model


def experts_error(source: Checkpoint, model: Any) -> tuple[float, float]:
    """Return squared error of the routed experts relative to their squares, and the gain."""
    off = size = along = 0.0
    for index, layer in enumerate(model.layers):
        if "switch_mlp" not in layer.mlp:
            continue
        for name in ("gate_proj", "up_proj", "down_proj"):
            read = layer.mlp.switch_mlp[name].weight
            for expert in range(read.shape[0]):
                key = f"model.layers.{index}.mlp.experts.{expert}.{name}.weight"
                whole = np.array(source.read(key).astype(mx.float32)).astype(np.float64)
                made = np.array(read[expert])
                off += float(((made - whole) ** 2).sum())
                along += float((made * whole).sum())
                size += float((whole**2).sum())
    return off / size, along / size


def judge(model: Any, reference: list[np.ndarray], texts: list[np.ndarray]) -> dict[str, float]:
    """Return mean KL with its standard error by window, top-1 agreement, and perplexity."""
    divergences, losses, agreements = [], [], []
    for wanted, ids in zip(reference, texts, strict=True):
        logits = logits_of(model, ids)
        divergences.append(float(kl_divergence(wanted, logits).mean()))
        agreements.append(top1_agreement(wanted, logits))
        rows = log_softmax(logits[:-1])
        losses.append(float(-np.take_along_axis(rows, ids[1:, None], axis=-1).mean()))
    return {
        "kl": float(np.mean(divergences)),
        "kl_error": float(np.std(divergences, ddof=1) / math.sqrt(len(divergences))),
        "top1": float(np.mean(agreements)),
        "perplexity": math.exp(float(np.mean(losses))),
    }


def main() -> None:
    """Print one line a variant."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--source", type=Path, default=tiny_glm_path())
    parser.add_argument("--text", type=Path, default=tiny_glm_path().with_name("held_out.txt"))
    parser.add_argument("--bits", type=int, default=2, help="of the routed experts")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--json", type=Path, help="also write all figures there")
    options = parser.parse_args()
    say: Callable[[str], None] = partial(print, flush=True)
    texts = windows(options.source, options.text, options.length, options.count)
    checkpoint = Checkpoint.open(options.source)
    rows: dict[str, dict[str, float]] = {}
    reference: list[np.ndarray] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, settings) in enumerate(VARIANTS.items()):
            folder = Path(scratch) / str(number)
            seconds = build(options.source, folder, options.bits, settings)
            if number == 0:
                whole = load_unquantized(options.source, folder)
                reference = [logits_of(whole, ids) for ids in texts]
                exact = judge(whole, reference, texts)
                say(f"{sum(map(len, texts)):,} tokens, source {exact['perplexity']:.4f}")
            model = dequantized(options.source, folder)
            error, gain = experts_error(checkpoint, model)
            rows[name] = judge(model, reference, texts) | {
                "expert_error": error,
                "gain": gain,
                "seconds": seconds,
                "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            }
            found, base = rows[name], rows["minmax"]
            say(
                f"{name:30} error {error:.4f} ({error / base['expert_error'] - 1:+.1%}) gain "
                f"{gain:.3f} KL {found['kl']:.5f} ± {found['kl_error']:.5f} "
                f"({found['kl'] / base['kl'] - 1:+.1%}) top-1 {found['top1']:.4f} "
                f"perplexity {found['perplexity']:.4f} {found['bytes']:,} bytes {seconds:.1f} s"
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
