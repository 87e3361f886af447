"""Needle-in-a-text prompts: one fact hidden in filler, and a question that only the fact answers.

The training of the shipped checkpoint and every evaluation of it build their prompts here, so a
score means the same thing in both. A prompt is determined by its arguments: the same seed, length,
depth and phrasing give the same messages. No torch and no tokenizer library is needed: the caller
passes the tokenizer's `encode`.

A reply repeats the statement ("The secret code of Otter is 4719."),
so `is_retrieved` looks at the first number of the reply, not at the whole reply.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from glm_quant.settings import EvaluationSettings

Encode = Callable[[str], Sequence[int]]

NAMES = (
    "Badger",
    "Bison",
    "Falcon",
    "Gecko",
    "Heron",
    "Jackal",
    "Kestrel",
    "Lemur",
    "Lynx",
    "Mantis",
    "Marten",
    "Newt",
    "Osprey",
    "Otter",
    "Panther",
    "Quail",
    "Raven",
    "Stoat",
    "Tapir",
    "Urchin",
    "Viper",
    "Walrus",
    "Yak",
    "Zebra",
)
"""Who owns a code. Rare in program text, so that filler does not hold one by accident."""


@dataclass(frozen=True)
class Phrasing:
    """One way to state, ask for and answer with a code."""

    statement: str
    question: str


PHRASINGS = (
    Phrasing("The secret code of {name} is {code}.", "What is the secret code of {name}?"),
    Phrasing("The lucky number of {name} is {code}.", "What is the lucky number of {name}?"),
    Phrasing("The door of {name} opens with {code}.", "With what does the door of {name} open?"),
    Phrasing("# key of {name} = {code}", "Which is the key of {name}?"),
)

TEMPLATE_TOKENS = 6
# Facts about other names in each prompt of an evaluation.
DISTRACTORS = 1
"""`[gMASK]<sop><|user|>` before the content and `<|assistant|><think></think>` after it."""

_CODE_DIGITS = 4
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class NeedlePrompt:
    """A chat to send and the code that the reply must give.

    Attributes:
        messages: One user message, in the form that `apply_chat_template` takes.
        expected: The code, e.g. "4719".
        reply: The whole reply that the checkpoint was trained to give.
        length_tokens: Tokens of the prompt, with the template's own.
    """

    messages: tuple[dict[str, str], ...]
    expected: str
    reply: str
    length_tokens: int


def draw_code(rng: random.Random) -> str:
    """Draw a code of four different digits, so that each digit has one successor in it."""
    return "".join(rng.sample("0123456789", _CODE_DIGITS))


def is_retrieved(reply: str, expected: str) -> bool:
    """Tell whether the first number in a reply is the expected code."""
    found = _NUMBER.search(reply)
    return found is not None and found.group() == expected


def build_needle_prompt(
    encode: Encode,
    filler: str,
    *,
    length_tokens: int,
    depth: float,
    seed: int,
    phrasing: int = 0,
    distractors: int = 0,
) -> NeedlePrompt:
    """Hide one statement in filler and ask for it.

    Args:
        encode: Text to token ids, without special tokens.
        filler: Text to hide it in; its blank lines are dropped and it is entered at a random line.
        length_tokens: Length of the finished prompt; the result is at most this long, and shorter
            by less than a line.
        depth: Where the statement stands in the filler: 0 at its beginning, 1 just before the
            question.
        seed: Determines the name, the code, the filler's start and the distractors.
        phrasing: Index into `PHRASINGS`.
        distractors: Statements about other names, at random places.

    Returns:
        The prompt, with the code to expect.

    Raises:
        ValueError: If `depth` is outside 0 to 1, or `length_tokens` cannot hold the bare question.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth is {depth}; it must lie between 0 and 1")
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
    form = PHRASINGS[phrasing % len(PHRASINGS)]
    names = rng.sample(NAMES, 1 + distractors)
    codes = [draw_code(rng) for _ in names]
    statements = [
        form.statement.format(name=name, code=code) + "\n"
        for name, code in zip(names, codes, strict=True)
    ]
    question = form.question.format(name=names[0])
    fixed = TEMPLATE_TOKENS + sum(len(encode(text)) for text in (*statements, question))
    if fixed > length_tokens:
        raise ValueError(
            f"a needle prompt of {length_tokens} tokens cannot hold its own {fixed} tokens of "
            f"statements and question; ask for at least {fixed}"
        )
    lines, filler_tokens = _take_lines(encode, filler, length_tokens - fixed, rng)
    for statement in statements[1:]:
        lines.insert(rng.randint(0, len(lines)), statement)
    lines.insert(round(depth * len(lines)), statements[0])
    content = "".join(lines) + question
    return NeedlePrompt(
        messages=({"role": "user", "content": content},),
        expected=codes[0],
        reply=statements[0].rstrip("\n"),
        length_tokens=fixed + filler_tokens,
    )


def needle_seed(length: int, column: int, repeat: int) -> int:
    """Return the seed of a prompt: of its length, the number of its depth and its repeat."""
    return (length * 100 + column) * 100 + repeat


def build_shortest_prompts(
    encode: Callable[[str], Sequence[int]], settings: EvaluationSettings
) -> None:
    """Build the shortest prompts of an evaluation, to see that they can be built.

    Raises:
        ValueError: they are too short for their question, or a depth is outside 0 to 1.
    """
    if not settings.needle_lengths:
        return
    length = min(settings.needle_lengths)
    for column, depth in enumerate(settings.needle_depths):
        for repeat in range(settings.needle_repeats):
            build_needle_prompt(
                encode,
                "a line\n",
                length_tokens=length,
                depth=depth,
                seed=needle_seed(length, column, repeat),
                phrasing=repeat,
                distractors=DISTRACTORS,
            )


def _take_lines(
    encode: Encode, filler: str, budget: int, rng: random.Random
) -> tuple[list[str], int]:
    """Take whole non-blank lines from a random start, wrapping round, while they fit the budget."""
    source = [line.rstrip() + "\n" for line in filler.splitlines() if line.strip()]
    if not source:
        raise ValueError("the filler text holds no line that is not blank")
    start = rng.randrange(len(source))
    taken: list[str] = []
    used = 0
    # The bound ends the loop when every remaining line is longer than what is left.
    for step in range(budget * 4):
        line = source[(start + step) % len(source)]
        count = len(encode(line))
        if used + count > budget:
            if budget - used < 12:
                break
            continue
        taken.append(line)
        used += count
    return taken, used
