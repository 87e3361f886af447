"""Replaying an expression: some rows of a parameter from some of the source's bytes.

Rows are those of the first axis. A range of them is pushed down through the expression to ranges of
the source tensors, and MLX's own operations are applied to what was read, so the values are those
that mlx-lm computes from whole tensors. An operation without a rule here is evaluated whole.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx

from glm_quant.architectures.expressions import (
    Expression,
    holds_expression,
    replace_expressions,
    row_elements,
)
from glm_quant.errors import CheckpointError

# (source tensor, first element, end element) to those elements in stored order, as a flat array of
# the dtype that MLX gives the tensor.
ReadElements = Callable[[str, int, int], mx.array]

# An operation without a rule needs its whole output in memory: beyond this it is refused.
MOST_WHOLE_ELEMENTS = 1 << 28


class SourceRange(NamedTuple):
    """Elements of a source tensor in stored order, `begin` to `end`."""

    name: str
    begin: int
    end: int


# Each output element depends on the elements at its own place: the range passes to every operand.
_ELEMENTWISE = """
abs add and astype bitwise_and bitwise_or ceil clip contiguous cos divide eq equal erf exp expm1
floor floordiv from_fp8 ge greater gt invert isfinite isinf isnan le left_shift less log log1p
log2 logical_and logical_not logical_or lshift lt maximum minimum mod mul multiply ne neg negative
or pow power radd reciprocal remainder rfloordiv right_shift rmod rmul round rpow rshift rsqrt
rsub rtruediv sigmoid sign sin sqrt square stop_gradient sub subtract tanh to_fp8 truediv where
xor
"""


class Replay:
    """Evaluates expressions row by row, reading the source through a function.

    Attributes:
        evaluated_whole: how often each operation without a rule was evaluated whole.
    """

    def __init__(self, read: ReadElements) -> None:
        """Read the source with `read`."""
        self._read = read
        self.evaluated_whole = Counter[str]()

    def whole(self, expression: Expression) -> mx.array:
        """Return all of an expression's values, lazily."""
        if not expression.ndim:
            return self._scalar(expression)
        return self.rows(expression, 0, expression.shape[0])

    def rows(self, expression: Expression, begin: int, end: int) -> mx.array:
        """Return rows `begin` to `end` of the first axis, lazily.

        Raises:
            CheckpointError: an operation without a rule, on an output too large to hold.
        """
        if expression.name is not None:
            width = row_elements(expression)
            elements = self._read(expression.name, begin * width, end * width)
            return elements.reshape(end - begin, *expression.shape[1:])
        rule = _RULES.get(expression.operation)
        rows = rule(self, expression, begin, end) if rule else None
        if rows is not None:
            return rows
        if (begin, end) == (0, expression.shape[0]):
            return self._apply(expression)
        if expression.size > MOST_WHOLE_ELEMENTS:
            raise CheckpointError(
                f"mlx-lm's model class applies {expression.operation}, which cannot be done row by "
                f"row, to make an array {list(expression.shape)} of {expression.size:,} elements; "
                f"at most {MOST_WHOLE_ELEMENTS:,} are held at a time. Convert this model with "
                "mlx_lm.convert."
            )
        self.evaluated_whole[expression.operation] += 1
        return self._apply(expression)[begin:end]

    def elements(self, source: Expression, begin: int, end: int) -> mx.array:
        """Return elements of a source tensor in stored order."""
        return self._read(str(source.name), begin, end)

    def part_of_row(self, source: Expression, row: int, begin: int, end: int) -> mx.array:
        """Return rows `begin` to `end` of one row of a source tensor of two axes or more."""
        width = math.prod(source.shape[2:])
        first = row * row_elements(source) + begin * width
        elements = self._read(str(source.name), first, first + (end - begin) * width)
        return elements.reshape(end - begin, *source.shape[2:])

    def _scalar(self, expression: Expression) -> mx.array:
        if expression.name is not None:
            return self._read(expression.name, 0, 1).reshape(())
        return self._apply(expression)

    def _apply(self, expression: Expression) -> mx.array:
        """Apply an operation to its whole operands."""
        return apply(expression, lambda value: replace_expressions(value, self.whole))


def apply(expression: Expression, evaluate: Callable[[Any], Any]) -> mx.array:
    """Apply an expression's operation to its arguments as `evaluate` gives them."""
    if expression.function is None:
        raise ValueError("a tensor of the source has no operation")
    arguments = [evaluate(argument) for argument in expression.arguments]
    keywords = {key: evaluate(value) for key, value in expression.keywords.items()}
    result = expression.function(*arguments, **keywords)
    return result if expression.output is None else result[expression.output]


# A rule returns the rows of an operation's output, or None where it does not apply.
_Rule = Callable[[Replay, Expression, int, int], mx.array | None]


def _argument(expression: Expression, position: int, name: str, default: Any = None) -> Any:
    if name in expression.keywords:
        return expression.keywords[name]
    if len(expression.arguments) > position:
        return expression.arguments[position]
    return default


def _elementwise(replay: Replay, node: Expression, begin: int, end: int) -> mx.array | None:
    """Give each operand the rows of the output, as broadcasting pairs them."""
    refused = False

    def part(value: Any) -> Any:
        nonlocal refused
        if not isinstance(value, Expression | mx.array):
            refused = refused or holds_expression(value)
            return value
        whole = value.ndim < node.ndim or value.shape[0] == 1
        if not whole and value.shape[0] != node.shape[0]:
            refused = True
            return value
        if isinstance(value, mx.array):
            return value if whole else value[begin:end]
        return replay.whole(value) if whole else replay.rows(value, begin, end)

    arguments = [part(value) for value in node.arguments]
    keywords = {key: part(value) for key, value in node.keywords.items()}
    if refused or node.function is None:
        return None
    result = node.function(*arguments, **keywords)
    return result if node.output is None else result[node.output]


def _grouped(replay: Replay, node: Expression, begin: int, end: int) -> mx.array | None:
    """Quantize or dequantize rows: groups of codes lie along the last axis, in each row apart."""
    return _elementwise(replay, node, begin, end) if node.ndim > 1 else None


def _stack(replay: Replay, node: Expression, begin: int, end: int) -> mx.array | None:
    arrays: Sequence[Any] = node.arguments[0]
    axis = _argument(node, 1, "axis", 0) % node.ndim
    if axis:
        return mx.stack([_rows_of(replay, array, begin, end) for array in arrays], axis=axis)
    return mx.stack([_whole_of(replay, array) for array in arrays[begin:end]])


def _concatenate(replay: Replay, node: Expression, begin: int, end: int) -> mx.array | None:
    arrays: Sequence[Any] = node.arguments[0]
    axis = _argument(node, 1, "axis", 0) % node.ndim
    if axis:
        return mx.concatenate([_rows_of(replay, array, begin, end) for array in arrays], axis=axis)
    parts: list[mx.array] = []
    offset = 0
    for array in arrays:
        first, last = max(begin - offset, 0), min(end - offset, array.shape[0])
        if first < last:
            parts.append(_rows_of(replay, array, first, last))
        offset += array.shape[0]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def _getitem(replay: Replay, node: Expression, begin: int, end: int) -> mx.array | None:
    array, index = node.arguments
    if not isinstance(array, Expression):
        return None
    entries = _full_index(index, array.ndim)
    if entries is None or entries[0] is None:
        return None
    first, rest = entries[0], entries[1:]
    if isinstance(first, int):
        row = first % array.shape[0]
        if array.name is not None and all(entry == slice(None) for entry in rest):
            return replay.part_of_row(array, row, begin, end) if node.ndim else None
        picked = replay.rows(array, row, row + 1)[(0, *rest)]
        return picked if not node.ndim else picked[begin:end]
    start, _, step = first.indices(array.shape[0])
    if step <= 0:
        return None
    last = start + (end - 1) * step
    rows = replay.rows(array, start + begin * step, last + 1)
    return rows[(slice(None, None, step), *rest)]


def _full_index(index: Any, ndim: int) -> list[Any] | None:
    """Return an index with an entry for each axis, or None if it is not of integers and slices."""
    entries = list(cast("tuple[Any, ...]", index)) if isinstance(index, tuple) else [index]
    if any(
        not (entry is None or entry is Ellipsis or isinstance(entry, int | slice))
        for entry in entries
    ):
        return None
    axes = sum(entry is not None and entry is not Ellipsis for entry in entries)
    fill = [slice(None)] * (ndim - axes)
    if Ellipsis in entries:
        place = entries.index(Ellipsis)
        return [*entries[:place], *fill, *entries[place + 1 :]]
    return [*entries, *fill]


def _reshape(replay: Replay, node: Expression, begin: int, end: int) -> mx.array | None:
    """Reshape: elements keep their order, so rows are a range of the operand's elements."""
    array = node.arguments[0]
    if not isinstance(array, Expression) or not node.ndim or not array.ndim or not node.size:
        return None
    width, array_width = row_elements(node), row_elements(array)
    first, last = begin * width, end * width
    first_row, end_row = first // array_width, -(-last // array_width)
    rows = replay.rows(array, first_row, end_row).reshape(-1)
    offset = first_row * array_width
    return rows[first - offset : last - offset].reshape(end - begin, *node.shape[1:])


def _swapaxes(replay: Replay, node: Expression, begin: int, end: int) -> mx.array | None:
    array, *axes = node.arguments
    names = ("axis1", "axis2") if node.operation == "swapaxes" else ("source", "destination")
    pair = [_argument(node, position + 1, name) for position, name in enumerate(names)]
    if not isinstance(array, Expression) or any(axis % array.ndim == 0 for axis in pair):
        return None
    if node.function is None:
        return None
    return node.function(replay.rows(array, begin, end), *axes, **node.keywords)


def _transpose(replay: Replay, node: Expression, begin: int, end: int) -> mx.array | None:
    array, *axes = node.arguments
    order = node.keywords.get("axes", axes)
    if len(order) == 1 and isinstance(order[0], list | tuple):
        order = order[0]
    if not isinstance(array, Expression) or not order or order[0] % array.ndim:
        return None
    return mx.transpose(replay.rows(array, begin, end), list(order))


def _split(replay: Replay, node: Expression, begin: int, end: int) -> mx.array | None:
    array = node.arguments[0]
    sections = _argument(node, 1, "indices_or_sections")
    axis = _argument(node, 2, "axis", 0)
    if not isinstance(array, Expression) or node.output is None:
        return None
    if axis % array.ndim:
        return mx.split(replay.rows(array, begin, end), sections, axis=axis)[node.output]
    if isinstance(sections, int):
        offset = node.output * (array.shape[0] // sections)
    else:
        offset = [0, *sections][node.output]
    return replay.rows(array, offset + begin, offset + end)


def _repeat(replay: Replay, node: Expression, begin: int, end: int) -> mx.array | None:
    array, count = node.arguments[:2]
    axis = _argument(node, 2, "axis")
    if not isinstance(array, Expression) or not isinstance(count, int) or axis is None:
        return None
    if axis % array.ndim:
        return mx.repeat(replay.rows(array, begin, end), count, axis=axis)
    first = begin // count
    rows = mx.repeat(replay.rows(array, first, -(-end // count)), count, axis=0)
    return rows[begin - first * count : end - first * count]


def _view(replay: Replay, node: Expression, begin: int, end: int) -> mx.array | None:
    """View rows as another dtype: it changes the last axis, in each row apart."""
    array, *dtype = node.arguments
    if node.ndim < 2 or not isinstance(array, Expression) or node.function is None:
        return None
    return node.function(replay.rows(array, begin, end), *dtype, **node.keywords)


def _pad(replay: Replay, node: Expression, begin: int, end: int) -> mx.array | None:
    """Pad with a constant, at the end of the first axis and anywhere on the others."""
    array, widths, *values = node.arguments
    if not isinstance(array, Expression) or not isinstance(widths, list | tuple):
        return None
    pairs = cast("Sequence[Any]", widths)
    if not isinstance(pairs[0], list | tuple) or pairs[0][0]:
        return None
    rows = array.shape[0]
    if node.function is None or begin >= rows:
        return None
    part = replay.rows(array, begin, min(end, rows))
    padding = [(0, end - begin - part.shape[0]), *pairs[1:]]
    return node.function(part, padding, *values, **node.keywords)


def _rows_of(replay: Replay, array: Any, begin: int, end: int) -> mx.array:
    return replay.rows(array, begin, end) if isinstance(array, Expression) else array[begin:end]


def _whole_of(replay: Replay, array: Any) -> mx.array:
    return replay.whole(array) if isinstance(array, Expression) else array


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    "concat": _concatenate,
    "concatenate": _concatenate,
    "dequantize": _grouped,
    "expand_dims": _reshape,
    "flatten": _reshape,
    "getitem": _getitem,
    "moveaxis": _swapaxes,
    "pad": _pad,
    "quantize": _grouped,
    "repeat": _repeat,
    "reshape": _reshape,
    "split": _split,
    "squeeze": _reshape,
    "stack": _stack,
    "swapaxes": _swapaxes,
    "transpose": _transpose,
    "unflatten": _reshape,
    "view": _view,
}
