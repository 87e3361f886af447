"""Greedy replies of a build, through its own chat template."""

from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step


def chat_ids(tokenizer: Any, content: str, *, thinking: bool) -> list[int]:
    """Return the token ids of one user message, up to where the reply begins."""
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, enable_thinking=thinking
    )


def greedy(model: Any, tokenizer: Any, ids: list[int], tokens: int) -> tuple[list[int], bool]:
    """Return at most so many tokens after a prompt, and whether the model ended by itself."""
    reply: list[int] = []
    for token, _ in generate_step(mx.array(ids), model, max_tokens=tokens):
        if int(token) in tokenizer.eos_token_ids:
            return reply, True
        reply.append(int(token))
    return reply, False


def answer_of(reply: str, end: str) -> str:
    """Return what a reply says after thinking; nothing if the thinking did not end."""
    return reply.partition(end)[2]
