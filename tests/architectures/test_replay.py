"""Expressions: what is recorded, and that rows replayed from ranges are the rows of the whole."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from glm_quant.architectures.expressions import (
    Expression,
    ValueUseError,
    describe,
    record,
    source_tensor,
    sources,
)
from glm_quant.architectures.replay import Replay
from glm_quant.architectures.segments import segments
from glm_quant.architectures.tracing import TRACING_MLX

# (mlx.core or its stand-in, tensors by name) to what is made of them.
Form = Callable[[Any, Any], Any]
SHAPES = {"a": (6, 4), "b": (6, 4), "c": (3, 8, 4), "d": (12, 8), "v": (6,)}
VALUES = {
    name: mx.array(np.random.default_rng(i).standard_normal(shape).astype(np.float32))
    for i, (name, shape) in enumerate(SHAPES.items())
}


def source(name: str) -> Expression:
    return source_tensor(name, SHAPES[name], mx.float32)


def read(name: str, begin: int, end: int) -> mx.array:
    return VALUES[name].reshape(-1)[begin:end]


FORMS: dict[str, Form] = {
    "a tensor": lambda _m, t: t["a"],
    "a stack": lambda m, t: m.stack([t["a"], t["b"]]),
    "a stack along another axis": lambda m, t: m.stack([t["a"], t["b"]], axis=1),
    "a concatenation": lambda m, t: m.concatenate([t["a"], t["b"]]),
    "a concatenation along the last axis": lambda m, t: m.concatenate([t["a"], t["b"]], axis=-1),
    "half of a split along the first axis": lambda m, t: m.split(t["a"], 2)[1],
    "a part of a split along another axis": lambda m, t: m.split(t["c"], [3], axis=1)[1],
    "heads cut and transposed": lambda m, t: m.contiguous(
        m.split(t["d"].reshape(3, 4, 8), [1], axis=1)[1].swapaxes(-1, -2)
    ),
    "experts cut in halves": lambda _m, t: t["c"][..., :4, :],
    "every second row": lambda _m, t: t["d"][1::2],
    "every second row of each expert": lambda _m, t: t["c"][:, ::2],
    "one expert": lambda _m, t: t["c"][1],
    "a new axis": lambda _m, t: t["a"][:, None, :],
    "a sum with a constant": lambda _m, t: t["a"] + 1.0,
    "a product with a vector": lambda _m, t: t["a"] * t["v"][:, None],
    "a padded matrix": lambda m, t: m.pad(t["a"], ((0, 2), (1, 0))),
    "rows repeated": lambda m, t: m.repeat(t["a"], 3, axis=0),
    "columns repeated": lambda m, t: m.repeat(t["a"], 2, axis=1),
    "a cast": lambda m, t: t["a"].astype(m.bfloat16),
    "a transpose, which has no rule": lambda _m, t: t["a"].T,
    "an axis moved": lambda _m, t: t["c"].moveaxis(2, 1),
    "quantized codes": lambda m, t: m.quantize(m.tile(t["d"], (1, 4)), group_size=32, bits=4)[0],
}


def traced(form: Form) -> Expression:
    return form(TRACING_MLX, {name: source(name) for name in SHAPES})


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_rows_are_those_of_the_whole(form: Form) -> None:
    """Any range of rows, read from as little of the source as the rules find, has the same bits."""
    expected, expression = form(mx, VALUES), traced(form)
    assert expression.shape == tuple(expected.shape)
    assert expression.dtype == expected.dtype
    replay = Replay(read)
    rows = expression.shape[0]
    for begin in range(rows):
        for end in range(begin + 1, rows + 1):
            part = replay.rows(expression, begin, end)
            assert mx.array_equal(part, expected[begin:end]), (begin, end)


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_segments_together_are_the_parameter(form: Form) -> None:
    """The segments' units, one after the other, are the parameter seen as a matrix."""
    expected, expression = form(mx, VALUES), traced(form)
    replay = Replay(read)
    pieces = segments(expression)
    parts = [
        piece.replay(replay, unit, unit + 1) for piece in pieces for unit in range(piece.units)
    ]
    matrix = expected.reshape(-1, expected.shape[-1])
    assert mx.array_equal(mx.concatenate(parts), matrix)
    assert [piece.first_row for piece in pieces] == [
        sum(earlier.rows for earlier in pieces[:i]) for i in range(len(pieces))
    ]


def test_experts_are_read_one_at_a_time() -> None:
    """A stack is cut into its experts; a row of an expert is a range of its own tensor."""
    stacked = traced(FORMS["a stack"])
    pieces = segments(stacked)
    assert [piece.source for piece in pieces] == ["a", "b"]
    assert pieces[1].reads(2, 4) == [("b", 8, 16)]
    cut = traced(FORMS["experts cut in halves"])
    assert segments(cut)[0].reads(1, 2) == [("c", 32, 64)]


def test_an_operation_without_a_rule_is_counted() -> None:
    """What is evaluated whole is correct, and is told."""
    replay = Replay(read)
    replay.rows(traced(FORMS["a transpose, which has no rule"]), 1, 2)
    assert replay.evaluated_whole == {"transpose": 1}


def test_values_cannot_be_asked_for() -> None:
    """A model class that looks at values is told of, with the tensor's name."""
    with pytest.raises(ValueUseError, match="source tensor a"):
        bool(source("a") + 1)
    with pytest.raises(ValueUseError, match="its value"):
        source("v")[0].item()


def test_the_text_of_an_expression_tells_what_it_computes() -> None:
    """Equal expressions have equal texts; another source, argument or order has another."""
    first = describe(traced(FORMS["a stack"]))
    assert first == describe(traced(FORMS["a stack"]))
    texts = {describe(traced(form)) for form in FORMS.values()}
    assert len(texts) == len(FORMS)


def test_the_text_of_a_long_sum_is_short() -> None:
    """An expression that uses a part many times names it once."""
    total = source("a")
    for _ in range(200):
        total = record("add", mx.add, (total, total), {})
    assert len(describe(total)) < 20_000
    assert sources(total) == {"a"}
