"""Small data sets in the schemas of the peers', cut from the held-out text; `items/` has them.

    python -m dev.make_items

makes the files again. They let the demo run the peers' protocols without a network. What a reader
would get wrong: they say something of the small checkpoint alone, which has read nothing but
Python; their scores are not those of HellaSwag, PIQA or WinoGrande.
"""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, TypeVar

from glm_quant.data import held_out_text, items_path

Row = dict[str, Any]
T = TypeVar("T")

# The first part of the text is measured by strided perplexity; items are from what follows.
_FIRST_LINE = 600
_ITEMS = 24
_SENTENCE = re.compile(r"[A-Z][A-Za-z ,']{50,140}\.")
_WORD = re.compile(r"\b[a-z]{4,}\b")


def conversations() -> list[Row]:
    """Return rows as tulu-3-sft-mixture has them: a part of a file, and how it goes on."""
    lines = held_out_text().splitlines()[_FIRST_LINE:]
    parts = ["\n".join(lines[i : i + 9]) for i in range(0, len(lines), 9)]
    return [
        {
            "messages": [
                {"role": "user", "content": f"Continue this file:\n{asked}"},
                {"role": "assistant", "content": answer},
            ]
        }
        for asked, answer in _spread(list(zip(parts[::2], parts[1::2], strict=False)), _ITEMS)
    ]


def endings() -> list[Row]:
    """Return rows as HellaSwag has them: half a sentence, its own end and three others'."""
    text = " ".join("\n".join(held_out_text().splitlines()[_FIRST_LINE:]).split())
    halves = [_halves(sentence) for sentence in dict.fromkeys(_SENTENCE.findall(text))]
    chosen = _spread(halves, _ITEMS)
    rows: list[Row] = []
    for number, (begin, end) in enumerate(chosen):
        others = [chosen[(number + step) % len(chosen)][1] for step in (5, 11, 17)]
        label = number % 4
        rows.append(
            {
                "activity_label": "Documentation",
                "ctx_a": begin,
                "ctx_b": "",
                "endings": [*others[:label], end, *others[label:]],
                "label": str(label),
            }
        )
    return rows


def next_lines() -> list[Row]:
    """Return rows as PIQA has them: a line of code, and two lines of which one follows it."""
    pairs = _spread(list(_code_pairs()), _ITEMS)
    rows: list[Row] = []
    for number, (line, following) in enumerate(pairs):
        other = pairs[(number + 7) % len(pairs)][1]
        label = number % 2
        first, second = (other, following) if label else (following, other)
        rows.append({"goal": line, "sol1": first, "sol2": second, "label": label})
    return rows


def names() -> list[Row]:
    """Return rows as WinoGrande has them: which of two names the rest of a line speaks of."""
    lines = [line for line in _lines() if "_" not in line and _twice(line)]
    chosen = _spread(list(dict.fromkeys(lines)), _ITEMS)
    rows: list[Row] = []
    for number, line in enumerate(chosen):
        right = _twice(line)
        wrong = next(
            name
            for step in range(3, len(chosen))
            if (name := _twice(chosen[(number + step) % len(chosen)])) != right
        )
        options = (wrong, right) if number % 2 else (right, wrong)
        rows.append(
            {
                "sentence": re.sub(rf"\b{right}\b", "_", line, count=1),
                "option1": options[0],
                "option2": options[1],
                "answer": str(1 + number % 2),
            }
        )
    return rows


FILES = {
    "python-chats.jsonl": conversations,
    "python-endings.jsonl": endings,
    "python-lines.jsonl": next_lines,
    "python-names.jsonl": names,
}


def main() -> None:
    """Write the files."""
    for name, make in FILES.items():
        items_path(name).write_text(as_lines(make()), encoding="utf-8")


def as_lines(rows: list[Row]) -> str:
    """Return rows as the text of a file of JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def _spread(found: list[T], count: int) -> list[T]:
    """Return so many of them, at even steps."""
    return [found[i * len(found) // count] for i in range(count)]


def _halves(sentence: str) -> tuple[str, str]:
    words = sentence.split()
    return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])


def _lines() -> list[str]:
    lines = (line.strip() for line in held_out_text().splitlines()[_FIRST_LINE:])
    return [line for line in lines if 24 <= len(line) <= 70]


def _code_pairs() -> Iterator[tuple[str, str]]:
    """Yield lines of code that follow one another in a block."""
    lines = held_out_text().splitlines()[_FIRST_LINE:]
    for line, following in pairwise(lines):
        if re.match(r"\s+(if|for|while|with|def|elif)\b.{12,}:$", line) and re.match(
            r"\s+\S.{11,50}$", following
        ):
            yield line.strip(), following.strip()


def _twice(line: str) -> str:
    """Return the first name that a line of code has twice, or nothing."""
    if not re.search(r"[=(]", line):
        return ""
    found = _WORD.findall(line)
    return next((name for name in found if found.count(name) > 1), "")


if __name__ == "__main__":
    main()
