"""What the small checkpoint can do, measured on the saved folder through transformers.

Nothing here looks at the training's own parameters: it loads the folder as any user does, in
float32 from the BF16 files, so the figures in `training.json` hold for the bytes that ship. Two
controls show that the sparse attention matters: attention to everything, and an indexer with half-
split RoPE, the mistake that has been made most often with this architecture.
"""

import contextlib
import math
import statistics
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from dev.tiny_model import Params, TinyGlm
from glm_quant.evaluation.needle_prompts import NeedlePrompt, build_needle_prompt, is_retrieved

LENGTHS = (64, 128, 256, 512)
"""1, 2, 4 and 8 times `index_topk`."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
WINDOW = 512
_REPLY_TOKENS = 20


def load_reference(folder: Path) -> tuple[Any, Any]:
    """Load the checkpoint with transformers, in float32.

    Returns:
        The model, in evaluation mode, and its tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def perplexity(model: Any, tokens: list[int], window: int = WINDOW) -> float:
    """Score text in windows that do not overlap; the first token of each is given."""
    rows = torch.tensor(tokens[: len(tokens) // window * window]).view(-1, window)
    losses: list[float] = []
    for batch in rows.split(4):
        logits = model(batch).logits[:, :-1]
        each = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        losses += each.view(len(batch), -1).mean(1).tolist()
    return math.exp(statistics.fmean(losses))


@torch.no_grad()
def reply_to(model: Any, tokenizer: Any, prompt: NeedlePrompt) -> str:
    """Answer a prompt greedily, with thinking off."""
    ids = _prompt_ids(tokenizer, prompt)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_REPLY_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def _prompt_ids(tokenizer: Any, prompt: NeedlePrompt) -> torch.Tensor:
    return tokenizer.apply_chat_template(
        list(prompt.messages),
        add_generation_prompt=True,
        enable_thinking=False,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]


def retrieves(model: Any, tokenizer: Any, prompt: NeedlePrompt) -> bool:
    """Tell whether the greedy reply gives the code.

    One pass over prompt and expected reply decides most cases: if every token of the reply is the
    likeliest after the ones before it, greedy generation writes it. Else it has to be generated.
    """
    ids = _prompt_ids(tokenizer, prompt)
    reply = tokenizer(prompt.reply, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(torch.cat([ids, reply], dim=1)).logits[0, ids.shape[1] - 1 : -1]
    if torch.equal(logits.argmax(-1), reply[0]):
        return True
    return is_retrieved(reply_to(model, tokenizer, prompt), prompt.expected)


def needle_scores(
    model: Any,
    tokenizer: Any,
    filler: str,
    *,
    lengths: tuple[int, ...] = LENGTHS,
    depths: tuple[float, ...] = DEPTHS,
    repeats: int = 8,
    distractors: int = 1,
) -> dict[str, dict[str, float]]:
    """Measure the share of codes retrieved, by prompt length and depth.

    Args:
        model: The reference model.
        tokenizer: Its tokenizer.
        filler: Text to hide the statements in.
        lengths: Prompt lengths in tokens.
        depths: Places of the statement.
        repeats: Prompts for each length and depth; they go round the phrasings.
        distractors: Statements about other names in each prompt.

    Returns:
        Shares from 0 to 1: scores[length][depth], keys as strings.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    scores: dict[str, dict[str, float]] = {}
    for length in lengths:
        row = scores.setdefault(str(length), {})
        for depth in depths:
            hits = 0
            # The depth's twentieths and the length keep the seeds of different cells apart.
            for repeat in range(repeats):
                prompt = build_needle_prompt(
                    encode,
                    filler,
                    length_tokens=length,
                    depth=depth,
                    seed=100_000 + length * 100 + round(depth * 20) * 8 + repeat,
                    phrasing=repeat,
                    distractors=distractors,
                )
                hits += retrieves(model, tokenizer, prompt)
            row[f"{depth:g}"] = hits / repeats
    return scores


@contextlib.contextmanager
def half_split_indexer() -> Generator[None]:
    """Rotate halves instead of interleaved pairs in transformers' indexer, and nowhere else."""
    from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as modeling

    right_rotation: Any = modeling.apply_rotary_pos_emb_interleave
    right_forward: Any = modeling.GlmMoeDsaIndexer.forward

    def rotate_half(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        half = cos.shape[-1] // 2
        cos, sin = (part[..., :half].unsqueeze(unsqueeze_dim) for part in (cos, sin))

        def rotate(x: Any) -> Any:
            first, second = x.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        return rotate(q), rotate(k)

    def forward(*args: Any, **kwargs: Any) -> Any:
        modeling.apply_rotary_pos_emb_interleave = rotate_half
        try:
            return right_forward(*args, **kwargs)
        finally:
            modeling.apply_rotary_pos_emb_interleave = right_rotation

    modeling.GlmMoeDsaIndexer.forward = forward
    try:
        yield
    finally:
        modeling.GlmMoeDsaIndexer.forward = right_forward


@contextlib.contextmanager
def dense_attention(model: Any) -> Generator[None]:
    """Let every indexer select everything."""
    indexers = [one for one in model.modules() if type(one).__name__ == "GlmMoeDsaIndexer"]
    kept = [one.index_topk for one in indexers]
    for one in indexers:
        one.index_topk = 1 << 30
    try:
        yield
    finally:
        for one, topk in zip(indexers, kept, strict=True):
            one.index_topk = topk


@torch.no_grad()
def largest_difference(model: Any, trained: TinyGlm, tokens: list[int]) -> float:
    """Compare transformers' logits with the training forward's on the same rounded weights."""
    row = torch.tensor([tokens[:WINDOW]])
    rounded: Params = {
        name: value.detach()
        if name.endswith("correction_bias")
        else value.detach().bfloat16().float()
        for name, value in trained.params.items()
    }
    ours = TinyGlm(trained.shape, rounded)
    trace, _ = ours(row, sparse=True)
    return (model(row).logits - ours.logits(trace.hidden)).abs().max().item()


@torch.no_grad()
def mtp_perplexity(trained: TinyGlm, tokens: list[int], window: int = WINDOW) -> float:
    """Score the MTP layer's guess of the token after next, which transformers cannot run."""
    losses: list[float] = []
    for start in range(0, min(len(tokens), 16 * window) - window + 1, window):
        row = torch.tensor([tokens[start : start + window]])
        _, drafted = trained(row, sparse=True, with_mtp=True)
        if drafted is not None:
            logits = trained.logits(drafted[:, :-1])
            losses.append(F.cross_entropy(logits[0], row[0, 2:]).item())
    return math.exp(statistics.fmean(losses))


def measure(folder: Path, trained: TinyGlm, held_out: str) -> dict[str, Any]:
    """Measure everything that `training.json` records about the saved folder."""
    model, tokenizer = load_reference(folder)
    tokens = tokenizer(held_out, add_special_tokens=False)["input_ids"]
    figures: dict[str, Any] = {
        "uniform_perplexity": trained.shape.vocab_size,
        "held_out_perplexity": round(perplexity(model, tokens), 3),
        "held_out_perplexity_first_4096_tokens": round(perplexity(model, tokens[:4096]), 3),
        "mtp_held_out_perplexity": round(mtp_perplexity(trained, tokens), 3),
        "largest_logit_difference_to_training_forward": largest_difference(model, trained, tokens),
        "needle": needle_scores(model, tokenizer, held_out),
    }
    controls = {
        "dense_attention": dense_attention(model),
        "half_split_indexer": half_split_indexer(),
    }
    for name, control in controls.items():
        with control:
            figures[name] = {
                "held_out_perplexity": round(perplexity(model, tokens), 3),
                "needle": needle_scores(model, tokenizer, held_out, lengths=LENGTHS[2:], repeats=4),
            }
    return figures
