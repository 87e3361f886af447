"""Train the small checkpoint that ships: `python -m dev.train_tiny --output DIR`.

Training goes through stages by the share of the time budget that is used: short rows first, then
rows of the full context, then the indexers learn the attention that they must select from
(DeepSeek-V3.2's warm-up), then the model runs with the selection applied, and the MTP layer learns
last.

What a reader would get wrong: the schedule follows the clock, so two runs from one seed see the
same rows in the same order but do not end in the same bytes.
"""

import argparse
import dataclasses
import json
import logging
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from dev.batches import Batch, BatchMaker
from dev.measure_tiny import measure
from dev.optimizer import Optimizer
from dev.pack import write_release
from dev.text import held_out_excerpt, load_corpus, train_tokenizer
from dev.tiny_model import Params, TinyGlm, TinyShape, Trace, init_params

VERSION = 1
"""Of this recipe: raised when the data, the shape or the schedule change."""

_LOG = logging.getLogger(__name__)
_BIAS_RATE = 5e-3
_BATCH_TOKENS = 3072
_INDEX_ROWS = 64
_MTP_WEIGHT = 0.5


@dataclass(frozen=True)
class Stage:
    """What is trained until a share of the time is used; row lengths take turns."""

    until: float
    lengths: tuple[int, ...]
    needle_share: float
    most_facts: int
    index: bool
    sparse: bool
    mtp: bool


STAGES = (
    # One fact first: with several from the start, copying was not learned in 900 steps.
    Stage(0.29, (128,), 0.75, 1, index=False, sparse=False, mtp=False),
    Stage(0.36, (256,), 0.6, 2, index=False, sparse=False, mtp=False),
    Stage(0.43, (256,), 0.5, 4, index=False, sparse=False, mtp=False),
    Stage(0.53, (512, 256), 0.5, 4, index=True, sparse=False, mtp=False),
    Stage(0.86, (512, 256), 0.5, 4, index=True, sparse=True, mtp=False),
    Stage(1.01, (512, 256), 0.5, 4, index=True, sparse=True, mtp=True),
)


def rate_factor(progress: float) -> float:
    """Shape the learning rate: short warm-up, flat to 45 %, then a cosine down to 2 %."""
    if progress < 0.01:
        return max(progress / 0.01, 0.05)
    if progress < 0.45:
        return 1.0
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min((progress - 0.45) / 0.55, 1.0)))


@dataclass
class Progress:
    """How far training has come; stored with the parameters, so that a run can be resumed."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Losses:
    """Figures of one step."""

    plain: float
    needle_accuracy: float
    index: float
    recall: float
    mtp: float


def train(
    output: Path, minutes: float, seed: int, resume: Path | None = None
) -> tuple[Params, Any, Progress]:
    """Train for a time budget, saving the state every few minutes.

    Args:
        output: Folder for `training.pt`, the state.
        minutes: Wall time to spend.
        seed: Determines the weights' start and the order of the rows.
        resume: A state to go on from.

    Returns:
        The parameters, the tokenizer, and the totals.
    """
    shape = TinyShape()
    corpus = load_corpus()
    tokenizer = train_tokenizer(corpus, seed)
    params = init_params(shape, seed)
    done = Progress()
    if resume is not None:
        state = torch.load(resume)
        params, done = state["params"], Progress(**state["progress"])
    maker = BatchMaker(corpus, tokenizer, seed + done.steps)
    for name, value in params.items():
        value.requires_grad_(not name.endswith("e_score_correction_bias"))
    _LOG.info(
        "%d parameters, %d tokens of text",
        sum(value.numel() for value in params.values()),
        maker.train_tokens,
    )
    model, optimizer = TinyGlm(shape, params), Optimizer(shape, params)
    rows_rng = torch.Generator().manual_seed(seed)
    started = time.monotonic() - done.seconds
    saved = time.monotonic()
    while (progress := (time.monotonic() - started) / (minutes * 60)) < 1.0:
        stage = next(stage for stage in STAGES if progress < stage.until)
        length = stage.lengths[done.steps % len(stage.lengths)]
        rows = _BATCH_TOKENS // length
        batch = maker.draw(rows, length, stage.needle_share, stage.most_facts)
        factor = rate_factor(progress)
        losses = _step(model, batch, stage, factor, rows_rng)
        optimizer.step(factor)
        done.steps += 1
        done.tokens += batch.tokens.numel()
        done.seconds = time.monotonic() - started
        if done.steps % 25 == 1:
            _LOG.info("%5.1f%% step %d %s", 100 * progress, done.steps, losses)
        if time.monotonic() - saved > 120:
            save_state(output, params, done)
            saved = time.monotonic()
    save_state(output, params, done)
    return params, tokenizer, done


def save_state(output: Path, params: Params, done: Progress) -> None:
    """Write the training state, replacing the last one only when it is whole."""
    output.mkdir(parents=True, exist_ok=True)
    partial = output / "training.pt.partial"
    torch.save(
        {"params": {k: v.detach() for k, v in params.items()}, "progress": vars(done)}, partial
    )
    partial.replace(output / "training.pt")


def _step(
    model: TinyGlm, batch: Batch, stage: Stage, factor: float, rng: torch.Generator
) -> Losses:
    """Run forward and backward for one batch and move the routing biases."""
    rows: Tensor | None = None
    if stage.index:
        # Earlier rows have nothing to leave out.
        length = batch.tokens.shape[1]
        late = torch.randperm(length - model.shape.index_topk, generator=rng)
        rows = (late[:_INDEX_ROWS] + model.shape.index_topk).sort().values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trace, drafted = model(
            batch.tokens, sparse=stage.sparse, index_rows=rows, with_mtp=stage.mtp
        )
        logits = model.logits(trace.hidden[:, :-1])
        loss, plain, accuracy = _next_token_loss(logits, batch)
        index_loss = torch.stack(trace.index_losses).mean() if trace.index_losses else None
        mtp_loss = _mtp_loss(model, drafted, batch) if drafted is not None else None
    total = loss
    if index_loss is not None:
        total = total + index_loss
    if mtp_loss is not None:
        total = total + _MTP_WEIGHT * mtp_loss
    total.backward()
    _balance(model.params, trace, _BIAS_RATE * factor)
    return Losses(
        plain=round(plain, 3),
        needle_accuracy=round(accuracy, 3),
        index=round(index_loss.item(), 3) if index_loss is not None else math.nan,
        recall=round(sum(trace.recalls) / max(len(trace.recalls), 1), 3),
        mtp=round(mtp_loss.item(), 3) if mtp_loss is not None else math.nan,
    )


def _next_token_loss(logits: Tensor, batch: Batch) -> tuple[Tensor, float, float]:
    """Weigh the cross entropy; give the plain rows' mean and the share of right facts too."""
    targets, weights = batch.tokens[:, 1:], batch.weights[:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    each = each.view_as(targets)
    facts = batch.is_reply_fact[:, 1:]
    right = (logits.argmax(-1) == targets)[facts].float().mean().item()
    plain = each[batch.is_reply_fact.any(1).logical_not()].mean().item()
    return (each * weights).sum() / weights.sum(), plain, right


def _mtp_loss(model: TinyGlm, drafted: Tensor, batch: Batch) -> Tensor:
    """Score the MTP layer's guess of the token after next; the head does not learn from it."""
    head = model.params["lm_head.weight"].detach()
    logits = F.linear(drafted[:, :-1], head).float()
    weights = batch.weights[:, 2:]
    each = F.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 2:].flatten(), reduction="none")
    return (each.view_as(weights) * weights).sum() / weights.sum()


@torch.no_grad()
def _balance(params: Params, trace: Trace, rate: float) -> None:
    """Raise the bias of experts that got less than their share (DeepSeek-V3's noaux_tc rule)."""
    for layer, load in trace.loads.items():
        bias = params[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        bias += rate * torch.sign(1 / len(load) - load)


def write_record(
    output: Path, done: Progress, figures: dict[str, Any], *, seed: int, threads: int
) -> None:
    """Write `training.json`: how the checkpoint was made and what it reaches."""
    record = {
        "recipe_version": VERSION,
        "command": "python -m dev.train_tiny",
        "seed": seed,
        "text": f"standard library of Python {platform.python_version()}, PSF licence",
        "stages": [dataclasses.asdict(stage) for stage in STAGES],
        "steps": done.steps,
        "tokens": done.tokens,
        "wall_seconds": round(done.seconds),
        "cpu": {"machine": platform.machine(), "threads": threads},
        "perplexity_protocol": "windows of 512 tokens of held_out.txt, float32, first token given",
        "needle_protocol": "share of exact codes by prompt tokens and depth, greedy, 1 distractor",
        "mtp": "trained in the last stage on detached states after model.norm",
        "versions": {"torch": torch.__version__, "transformers": version("transformers")},
        **figures,
    }
    text = json.dumps(record, indent=2)
    (output / "training.json").write_text(text + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, write the checkpoint in the release's layout, and measure it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=56.0, help="wall time to train")
    parser.add_argument("--seed", type=int, default=20, help="of weights, tokenizer and rows")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--resume", type=Path, help="a training.pt to go on from")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    state = options.output.with_name(options.output.name + ".state")
    params, tokenizer, done = train(state, options.minutes, options.seed, options.resume)
    shape = TinyShape()
    write_release(options.output, shape, params, tokenizer)
    held_out = held_out_excerpt(load_corpus())
    options.output.with_name("held_out.txt").write_text(held_out, encoding="utf-8")
    figures = measure(options.output, TinyGlm(shape, params), held_out)
    write_record(options.output, done, figures, seed=options.seed, threads=options.threads)


if __name__ == "__main__":
    main()
