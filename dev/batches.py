"""Training rows of the small checkpoint: plain text, and conversations about needles hidden in it.

A row is [length] token ids with a weight per token for the loss. The digits of a statement cannot
be predicted and weigh nothing; the name and the digits of a reply are what retrieval is, and weigh
most.
"""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dev.text import Corpus
from glm_quant.evaluation.needle_prompts import NAMES, PHRASINGS, draw_code

_REPLY_FACT_WEIGHT = 10.0
_REPLY_WEIGHT = 2.0


@dataclass(frozen=True)
class Batch:
    """Rows to train on.

    Attributes:
        tokens: Ids [batch, length].
        weights: Weight of each token as a target [batch, length].
        is_reply_fact: Marks the names and digits that must be retrieved [batch, length].
    """

    tokens: Tensor
    weights: Tensor
    is_reply_fact: Tensor


class BatchMaker:
    """Draws rows from tokenized training text, reproducibly from a seed."""

    def __init__(self, corpus: Corpus, tokenizer: Any, seed: int) -> None:
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
        self._id: dict[str, int] = tokenizer.get_vocab()
        self._cache: dict[str, list[int]] = {}
        end = self._id["<|endoftext|>"]
        stream: list[int] = []
        for encoding in tokenizer.encode_batch(list(corpus.train)):
            stream += [end, *encoding.ids]
        self._stream = stream
        lines = [
            line.rstrip() + "\n"
            for text in corpus.train
            for line in text.splitlines()
            if line.strip()
        ]
        self._lines: list[list[int]] = [one.ids for one in tokenizer.encode_batch(lines)]

    @property
    def train_tokens(self) -> int:
        """Tokens of the whole training text."""
        return len(self._stream)

    def draw(self, rows: int, length: int, needle_share: float, most_facts: int) -> Batch:
        """Draw a batch in which about `needle_share` of the rows are conversations.

        Args:
            rows: Rows of the batch.
            length: Tokens of a row.
            needle_share: Share of conversations, from 0 to 1.
            most_facts: Statements in one conversation, at most.
        """
        kinds = [index < round(rows * needle_share) for index in range(rows)]
        drawn = [
            self._needle_row(length, most_facts) if kind else self._plain_row(length)
            for kind in kinds
        ]
        tokens, weights, facts = (np.array(part) for part in zip(*drawn, strict=True))
        return Batch(
            tokens=torch.from_numpy(tokens),
            weights=torch.from_numpy(weights).float(),
            is_reply_fact=torch.from_numpy(facts),
        )

    def _plain(self, length: int) -> list[int]:
        start = self._rng.randrange(len(self._stream) - length)
        return self._stream[start : start + length]

    def _plain_row(self, length: int) -> tuple[list[int], list[float], list[bool]]:
        return self._plain(length), [1.0] * length, [False] * length

    def _encode(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self._tokenizer.encode(text).ids
        return self._cache[text]

    def _needle_row(
        self, length: int, most_facts: int
    ) -> tuple[list[int], list[float], list[bool]]:
        """Make one conversation of random length, and fill the row up with plain text."""
        rng = self._rng
        facts = rng.randint(1, most_facts)
        # Two kinds of statement may stand side by side, so the question's wording matters too.
        forms = rng.sample(PHRASINGS, 2)
        owners = [(name, rng.choice(forms), draw_code(rng)) for name in rng.sample(NAMES, facts)]
        asked = rng.sample(owners, rng.randint(1, facts))
        if facts == 1:
            # Asked again, the reply stands nearer: the easiest to copy, so copying starts here.
            asked *= rng.randint(1, 3)
        parts = [self._statement(*owner, closing="\n") for owner in owners]
        turns = self._turns(asked)
        fixed = 3 + sum(len(ids) for ids, _ in parts) + len(turns[0])
        if fixed + 20 > length:
            return self._needle_row(length, max(most_facts - 1, 1))
        budget = (length if rng.random() < 0.5 else rng.randint(fixed + 10, length)) - fixed
        content = self._filler(budget)
        for part in parts:
            content.insert(rng.randint(0, len(content)), part)
        ids = [self._id["[gMASK]"], self._id["<sop>"], self._id["<|user|>"]]
        weights = [0.0, 0.0, 0.0]
        for part, part_weights in content:
            ids += part
            weights += part_weights
        marks = [False] * len(ids)
        ids, weights, marks = ids + turns[0], weights + turns[1], marks + turns[2]
        rest = length - len(ids)
        if rest > 0:
            ids += [self._id["<|endoftext|>"], *self._plain(rest)][:rest]
            weights += [1.0] * rest
            marks += [False] * rest
        return ids[:length], weights[:length], marks[:length]

    def _filler(self, budget: int) -> list[tuple[list[int], list[float]]]:
        start = self._rng.randrange(len(self._lines))
        taken: list[tuple[list[int], list[float]]] = []
        for step in range(len(self._lines)):
            line = self._lines[(start + step) % len(self._lines)]
            if len(line) > budget:
                break
            budget -= len(line)
            taken.append((line, [1.0] * len(line)))
        return taken

    def _statement(
        self, name: str, form: Any, code: str, closing: str
    ) -> tuple[list[int], list[float]]:
        ids = self._tokenizer.encode(form.statement.format(name=name, code=code) + closing).ids
        digits = {self._id[digit] for digit in "0123456789"}
        return ids, [0.0 if one in digits else 1.0 for one in ids]

    def _turns(self, asked: list[Any]) -> tuple[list[int], list[float], list[bool]]:
        """Encode questions and replies as the chat template does; the next `<|user|>` ends one."""
        start = [self._id[one] for one in ("<|assistant|>", "<think>", "</think>")]
        user = self._id["<|user|>"]
        ids: list[int] = []
        weights: list[float] = []
        marks: list[bool] = []
        digit_ids = {self._id[digit] for digit in "0123456789"}
        for name, form, code in asked:
            question = self._encode(form.question.format(name=name))
            reply = self._tokenizer.encode(form.statement.format(name=name, code=code)).ids
            # A reply that starts with another's name would go on with that one's code.
            facts = {*digit_ids, *self._encode(f" {name}")}
            is_fact = [one in facts for one in reply]
            ids += [*question, *start, *reply, user]
            weights += [1.0] * (len(question) + len(start))
            weights += [_REPLY_FACT_WEIGHT if one else _REPLY_WEIGHT for one in is_fact]
            weights += [_REPLY_WEIGHT]
            marks += [False] * (len(question) + len(start)) + is_fact + [False]
        return ids, weights, marks
