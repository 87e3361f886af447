"""Segments: a parameter cut where its sources change, so that each piece can be made on its own.

Every parameter is seen as a matrix of rows × last axis. A stack of experts is cut into experts, a
concatenation into its parts; what remains is cut into units, the fewest rows that can be made
without reading more of the source than they need.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import mlx.core as mx

from glm_quant.architectures.expressions import Expression, leaves, record
from glm_quant.architectures.replay import Replay, SourceRange

# Operations whose output has the rows of their first operand, changed each on its own.
_UNARY = frozenset({"astype", "contiguous", "stop_gradient"})


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive rows of a parameter that are made from one expression.

    Attributes:
        expression: what makes them.
        first_row: the first of them in the parameter.
        rows: how many they are.
        unit_rows: how many of them are made together at the least.
        source: the source tensor that gives most of their bytes; empty for a constant.
        source_rows: how many rows that tensor has, seen as a matrix.
        source_elements: how many elements.
        source_bytes: its size.
    """

    expression: Expression
    first_row: int
    rows: int
    unit_rows: int
    source: str
    source_rows: int
    source_elements: int
    source_bytes: int

    @cached_property
    def source_tensors(self) -> tuple[Expression, ...]:
        """The tensors of the source that it is made of."""
        return tuple(leaves(self.expression))

    @property
    def is_copy(self) -> bool:
        """Whether its rows are those of its source tensor, as they are stored."""
        return self.expression.name is not None

    @property
    def units(self) -> int:
        """How many units there are."""
        return self.rows // self.unit_rows

    def replay(self, replay: Replay, begin: int, end: int) -> mx.array:
        """Return units `begin` to `end` as a matrix, [rows, last axis]."""
        expression = self.expression
        if expression.ndim < 2:
            return replay.whole(expression).reshape(1, -1)
        if self.is_copy and expression.ndim > 2:
            width = expression.shape[-1]
            return replay.elements(expression, begin * width, end * width).reshape(-1, width)
        return replay.rows(expression, begin, end).reshape(-1, expression.shape[-1])

    def reads(self, begin: int, end: int) -> list[SourceRange]:
        """Return what of the source is read for units `begin` to `end`."""
        ranges: dict[SourceRange, None] = {}
        dtypes = {str(leaf.name): leaf.dtype for leaf in self.source_tensors}

        def note(name: str, first: int, last: int) -> mx.array:
            ranges[SourceRange(name, first, last)] = None
            return mx.zeros((last - first,), dtypes[name])

        self.replay(Replay(note), begin, end)
        return list(ranges)


def matrix_rows(shape: tuple[int, ...]) -> int:
    """Return the rows of an array of some shape, seen as a matrix of rows × last axis."""
    return math.prod(shape[:-1])


def segments(expression: Expression) -> list[Segment]:
    """Return the segments of a parameter in the order of their rows."""
    pieces: list[Segment] = []
    first_row = 0
    for part in _parts(expression):
        rows = matrix_rows(part.shape)
        # A stored matrix of any number of axes can be cut anywhere; what is computed, between the
        # rows of its first axis.
        whole = part.ndim < 3 or part.name is not None
        unit_rows = 1 if whole else math.prod(part.shape[1:-1])
        source = _main_source(part)
        pieces.append(
            Segment(
                part,
                first_row,
                rows,
                unit_rows,
                str(source.name) if source is not None else "",
                matrix_rows(source.shape) if source is not None else 0,
                source.size if source is not None else 0,
                source.nbytes if source is not None else 0,
            )
        )
        first_row += rows
    return pieces


def _parts(expression: Expression) -> Iterator[Expression]:
    """Yield expressions whose rows, one after the other, are those of an expression."""
    operand = expression.arguments[0] if expression.arguments else None
    if expression.operation in _UNARY and isinstance(operand, Expression):
        yield from _unary_parts(expression, operand)
    elif _joins_rows(expression, operand):
        for array in expression.arguments[0]:
            yield from _parts(array)
    else:
        yield expression


def _unary_parts(expression: Expression, operand: Expression) -> Iterator[Expression]:
    """Yield an operation on each part of its operand."""
    for part in _parts(operand):
        if part is operand or expression.function is None:
            yield expression
        else:
            arguments = (part, *expression.arguments[1:])
            yield record(expression.operation, expression.function, arguments, expression.keywords)


def _joins_rows(expression: Expression, arrays: Any) -> bool:
    """Whether an expression puts the rows of several, as matrices, one after the other."""
    if not isinstance(arrays, list | tuple) or _axis(expression):
        return False
    if not all(isinstance(array, Expression) for array in cast("Sequence[Any]", arrays)):
        return False
    if expression.operation == "stack":
        return expression.ndim > 2
    return expression.operation in ("concatenate", "concat") and expression.ndim > 1


def _axis(expression: Expression) -> int:
    arguments = expression.arguments
    axis = expression.keywords.get("axis", arguments[1] if len(arguments) > 1 else 0)
    return axis % expression.ndim if isinstance(axis, int) and expression.ndim else 0


def _main_source(expression: Expression) -> Expression | None:
    """Return the largest source tensor of an expression; the first by name among equals."""
    tensors = list(leaves(expression))
    return min(tensors, key=lambda leaf: (-leaf.nbytes, str(leaf.name)), default=None)


def unit_elements(segment: Segment) -> int:
    """Return the number of elements in one unit of a segment."""
    return segment.unit_rows * math.prod(segment.expression.shape[-1:])
