"""Expressions: how each parameter of an MLX model is computed from a checkpoint's tensors.

mlx-lm's model classes rename, stack, split and cast the tensors of a checkpoint in a method of
their own, `sanitize`. Given traced arrays instead of values, that method leaves behind an
expression for each parameter: an operation of MLX, its arguments, and so on down to the tensors of
the source. MLX itself infers each shape and dtype, on arrays that are never evaluated.
"""

import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np

from glm_quant.errors import CheckpointError
from glm_quant.fingerprint import Canonical

SOURCE = "source"
# An array that a model class makes itself, such as a table of positions, is part of the expression.
_MOST_CONSTANT_BYTES = 64 << 20


class ValueUseError(CheckpointError):
    """A model class looks at a value while it arranges the tensors: headers cannot tell it."""


class Expression:
    """An array that is known by how it is computed.

    It stands for an `mx.array` inside `sanitize`: it has shape and dtype, every operation on it
    gives another expression, and its values cannot be asked for.

    Attributes:
        operation: name of the operation, such as "stack"; `SOURCE` for a tensor of the source.
        function: what computes it from the arguments; None for a tensor of the source.
        arguments: positional arguments, with expressions in place of arrays.
        keywords: keyword arguments.
        output: which of the operation's outputs it is, where there are several.
        placeholder: a lazy array of its shape and dtype, which takes no memory.
        name: the source tensor's name, for a tensor of the source.
    """

    __slots__ = (
        "arguments",
        "function",
        "keywords",
        "name",
        "operation",
        "output",
        "placeholder",
    )

    def __init__(
        self,
        operation: str,
        function: Callable[..., Any] | None,
        placeholder: mx.array,
        arguments: tuple[Any, ...] = (),
        keywords: Mapping[str, Any] | None = None,
    ) -> None:
        """Record an operation."""
        self.operation = operation
        self.function = function
        self.placeholder = placeholder
        self.arguments = arguments
        self.keywords: Mapping[str, Any] = keywords or {}
        self.output: int | None = None
        self.name: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return tuple(self.placeholder.shape)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype."""
        return self.placeholder.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.placeholder.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.placeholder.size

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.placeholder.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.placeholder.nbytes

    @property
    def T(self) -> "Expression":  # noqa: N802 - MLX's name
        """The transpose."""
        return record("transpose", mx.transpose, (self,), {})

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator["Expression"]:
        return (self[row] for row in range(self.shape[0]))

    def __getitem__(self, index: Any) -> "Expression":
        return record("getitem", operator.getitem, (self, index), {})

    def __getattr__(self, name: str) -> Any:
        """Return a method of `mx.array` that records its call."""
        method = getattr(mx.array, name, None)
        if name.startswith("__") or not callable(method):
            raise AttributeError(name)
        return lambda *arguments, **keywords: record(name, method, (self, *arguments), keywords)

    def __bool__(self) -> bool:
        raise ValueUseError(self._value_use("whether it is true"))

    def item(self) -> Any:
        """Refuse to tell a value."""
        raise ValueUseError(self._value_use("its value"))

    def tolist(self) -> Any:
        """Refuse to tell the values."""
        raise ValueUseError(self._value_use("its values"))

    def __hash__(self) -> int:
        return id(self)

    def _value_use(self, question: str) -> str:
        names = ", ".join(sorted(sources(self))[:3]) or "none"
        return (
            f"mlx-lm's model class asks for {question} of an array made from the source tensor "
            f"{names}, so headers alone cannot tell what the checkpoint becomes."
        )


def _forward(name: str) -> Callable[..., Any]:
    """Return the operator method `__name__` of expressions."""
    method = getattr(mx.array, f"__{name}__")

    def apply(self: Expression, *arguments: Any) -> Any:
        return record(name, method, (self, *arguments), {})

    return apply


# What `mx.array` has of Python's operators. `==` compares values, as it does for arrays.
_OPERATORS = """
add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow neg matmul and or
xor lshift rshift lt gt le ge eq ne invert abs
"""
for _operator in _OPERATORS.split():
    if hasattr(mx.array, f"__{_operator}__"):
        setattr(Expression, f"__{_operator}__", _forward(_operator))


def source_tensor(name: str, shape: Sequence[int], dtype: mx.Dtype) -> Expression:
    """Return the expression of a tensor of the source."""
    expression = Expression(SOURCE, None, mx.zeros(shape, dtype))
    expression.name = name
    return expression


def constant(array: mx.array) -> Expression:
    """Return the expression of an array that a model class made itself."""
    return Expression("constant", lambda: array, mx.zeros(array.shape, array.dtype))


def record(
    operation: str, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: Any
) -> Any:
    """Return the expression of a call, or a sequence of them where the call gives several arrays.

    Shape and dtype are those that MLX infers from placeholders. A result that is no array, such as
    a dtype, is returned as it is.
    """
    result = function(*_placeholders(arguments), **_placeholders(keywords))
    if isinstance(result, mx.array):
        return _node(operation, function, result, arguments, keywords, None)
    if isinstance(result, list | tuple) and all(isinstance(part, mx.array) for part in result):
        parts = cast("Sequence[mx.array]", result)
        return [
            _node(operation, function, part, arguments, keywords, number)
            for number, part in enumerate(parts)
        ]
    return result


def _node(
    operation: str,
    function: Callable[..., Any],
    result: mx.array,
    arguments: tuple[Any, ...],
    keywords: Mapping[str, Any],
    output: int | None,
) -> Expression:
    # A fresh array of the same shape and dtype lets go of the graph that led to it.
    placeholder = mx.zeros(result.shape, result.dtype)
    expression = Expression(operation, function, placeholder, arguments, keywords)
    expression.output = output
    return expression


def holds_expression(value: Any) -> bool:
    """Whether a value is an expression or a list, tuple or mapping that holds one."""
    if isinstance(value, Expression):
        return True
    if isinstance(value, list | tuple):
        return any(holds_expression(entry) for entry in cast("Sequence[Any]", value))
    if isinstance(value, dict):
        return any(holds_expression(entry) for entry in cast("dict[Any, Any]", value).values())
    return False


def replace_expressions(value: Any, replacement: Callable[[Expression], Any]) -> Any:
    """Return a value with each expression in it replaced."""
    if isinstance(value, Expression):
        return replacement(value)
    if isinstance(value, list | tuple):
        entries = cast("Sequence[Any]", value)
        return type(value)(replace_expressions(entry, replacement) for entry in entries)
    if isinstance(value, dict):
        mapping = cast("dict[Any, Any]", value)
        return {key: replace_expressions(entry, replacement) for key, entry in mapping.items()}
    return value


def _placeholders(value: Any) -> Any:
    return replace_expressions(value, lambda expression: expression.placeholder)


def operands(expression: Expression) -> Iterator[Expression]:
    """Yield the expressions among an expression's arguments."""
    pending: list[Any] = [expression.arguments, expression.keywords]
    while pending:
        value = pending.pop()
        if isinstance(value, Expression):
            yield value
        elif isinstance(value, list | tuple):
            pending.extend(reversed(cast("Sequence[Any]", value)))
        elif isinstance(value, Mapping):
            pending.extend(cast("Mapping[Any, Any]", value).values())


def leaves(expression: Expression) -> Iterator[Expression]:
    """Yield the tensors of the source that an expression is made of, each once."""
    seen: set[int] = set()
    pending = [expression]
    while pending:
        node = pending.pop()
        if id(node) not in seen:
            seen.add(id(node))
            if node.name is not None:
                yield node
            else:
                pending.extend(operands(node))


def sources(expression: Expression) -> set[str]:
    """Return the names of the source tensors that an expression is made of."""
    return {str(leaf.name) for leaf in leaves(expression)}


def describe(expression: Expression) -> str:
    """Return an expression as canonical text: equal texts compute equal values from equal sources.

    The text is a JSON list of nodes, each after those that it refers to by number.
    """
    numbers: dict[int, int] = {}
    nodes: list[Canonical] = []

    def number(node: Expression) -> int:
        # An explicit stack: a running sum over thousands of tensors is as deep as it is long.
        pending = [(node, False)]
        while pending:
            current, ready = pending.pop()
            if id(current) in numbers:
                continue
            if not ready:
                pending.append((current, True))
                pending.extend((operand, False) for operand in operands(current))
                continue
            numbers[id(current)] = len(nodes)
            nodes.append(_text_of(current, numbers))
        return numbers[id(node)]

    number(expression)
    return json.dumps(nodes, sort_keys=True, separators=(",", ":"))


def _text_of(node: Expression, numbers: Mapping[int, int]) -> Canonical:
    if node.name is not None:
        return [SOURCE, node.name, list(node.shape), str(node.dtype)]
    if node.operation == "constant" and node.function is not None:
        return ["constant", constant_digest(node.function())]
    return [
        node.operation,
        [_argument_text(value, numbers) for value in node.arguments],
        {key: _argument_text(value, numbers) for key, value in node.keywords.items()},
        node.output,
    ]


def _argument_text(value: Any, numbers: Mapping[int, int]) -> Canonical:
    if isinstance(value, Expression):
        return {"node": numbers[id(value)]}
    if isinstance(value, list | tuple):
        return [_argument_text(entry, numbers) for entry in cast("Sequence[Any]", value)]
    if isinstance(value, slice):
        return {"slice": [_argument_text(part, numbers) for part in _slice_parts(value)]}
    if isinstance(value, mx.array):
        return {"array": constant_digest(value)}
    if value is None or isinstance(value, bool | int | str):
        return value
    # Floats, dtypes, Ellipsis and the like are told apart by what they print.
    return {"value": repr(value)}


def _slice_parts(value: slice) -> tuple[Any, Any, Any]:
    return value.start, value.stop, value.step


def constant_digest(array: mx.array) -> str:
    """Return shape, dtype and sha256 of an array that a model class made itself.

    Raises:
        CheckpointError: it is too large to be one.
    """
    if array.nbytes > _MOST_CONSTANT_BYTES:
        raise CheckpointError(
            f"The model class of mlx-lm makes an array of {array.nbytes:,} bytes of its own; "
            f"{_MOST_CONSTANT_BYTES:,} are accepted. The config's dims are beyond any real model."
        )
    flat = mx.contiguous(array).reshape(-1)
    data = np.asarray(flat.view(mx.uint8)) if array.size else np.zeros(0, np.uint8)
    return f"{list(array.shape)} {array.dtype} {hashlib.sha256(data.tobytes()).hexdigest()}"


def row_elements(expression: Expression) -> int:
    """Return the number of elements in one row of the first axis."""
    return math.prod(expression.shape[1:])
