"""The small data sets that ship: what the script makes of the held-out text, in peers' schemas."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from dev.make_items import FILES, as_lines
from glm_quant.data import held_out_text, items_path
from glm_quant.errors import RecipeError
from glm_quant.evaluation.data_files import data_file


@pytest.mark.parametrize(("name", "make"), FILES.items())
def test_files_are_what_the_script_makes(
    name: str, make: Callable[[], list[dict[str, Any]]]
) -> None:
    assert items_path(name).read_text(encoding="utf-8") == as_lines(make())


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in items_path(name).read_text().splitlines()]


def test_right_answers_are_the_texts_own() -> None:
    """Each marked answer completes what stands in the text, and the other answers do not."""
    text = " ".join(held_out_text().split())
    for row in rows("python-endings.jsonl"):
        right = int(row["label"])
        for number, ending in enumerate(row["endings"]):
            assert (f"{row['ctx_a']} {ending}" in text) == (number == right)
    for row in rows("python-lines.jsonl"):
        for number, line in enumerate((row["sol1"], row["sol2"])):
            assert (f"{row['goal']} {line}" in text) == (number == row["label"])
    for row in rows("python-names.jsonl"):
        assert row["sentence"].count("_") == 1
        for number, name in enumerate((row["option1"], row["option2"]), 1):
            whole = " ".join(row["sentence"].replace("_", name).split())
            assert (whole in text) == (str(number) == row["answer"])


def test_answers_are_spread_evenly() -> None:
    """Always naming the same option is as good as chance."""
    assert sorted(row["label"] for row in rows("python-endings.jsonl")) == sorted("0123" * 6)
    assert sum(row["label"] for row in rows("python-lines.jsonl")) == 12
    assert sum(row["answer"] == "1" for row in rows("python-names.jsonl")) == 12


def test_a_name_that_does_not_ship_is_refused_with_those_that_do() -> None:
    with pytest.raises(RecipeError, match=r"shipped:hellaswag: no such .* shipped:python-chats"):
        data_file("shipped:hellaswag")
    assert data_file("shipped:python-lines.jsonl") == items_path("python-lines.jsonl")
