"""How much memory a streamed pass takes, known before it starts, and how to stay within a limit.

What is always there: a layer without its routed experts, the experts in flight, one sequence's
attention, and a block of logits. What grows with the tokens: their hidden states. So the limit
decides how many sequences go through a layer together (a wave); each further wave reads the
experts once more and changes no result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from glm_quant.errors import EvaluationError
from glm_quant.model.geometry import Geometry
from glm_quant.streaming.weights import AHEAD

# Tokens that go through a feed-forward matrix at a time.
MLP_ROWS = 2048
# Block of logits that is in memory at a time: rows (positions) x columns (vocabulary).
LOGIT_ROWS, LOGIT_COLUMNS = 1024, 8192

_FLOAT = 4


@dataclass(frozen=True)
class MemoryPlan:
    """What a pass will take.

    Attributes:
        fixed_bytes: independent of the number of tokens.
        token_bytes: for each token of a wave.
        waves: numbers of the sequences of each wave.
        total_bytes: of the largest wave.
    """

    fixed_bytes: int
    token_bytes: int
    waves: tuple[tuple[int, ...], ...]
    total_bytes: int


def plan_memory(
    geometry: Geometry, lengths: Sequence[int], limit_bytes: int, block_elements: int
) -> MemoryPlan:
    """Divide sequences into waves.

    Args:
        geometry: the model's dims.
        lengths: tokens of each sequence.
        limit_bytes: what the pass may take.
        block_elements: the runtime's bound on temporaries of attention.

    Raises:
        EvaluationError: the limit has no room for the longest sequence.
    """
    fixed = max(
        _layer_bytes(geometry)
        + max(_attention_bytes(geometry, max(lengths), block_elements), _mlp_bytes(geometry)),
        _logit_bytes(geometry),
    )
    # Input, after attention, normed, output; the selection that came and the one that goes.
    token = 4 * _FLOAT * geometry.hidden_size + 2 * _FLOAT * geometry.index_topk
    if fixed + token * max(lengths) > limit_bytes:
        raise EvaluationError(
            f"divergence: {(fixed + token * max(lengths)) / 1e9:,.2f} GB are needed for a "
            f"sequence of {max(lengths):,} tokens, the limit is {limit_bytes / 1e9:,.2f} GB. Raise "
            "the recipe's divergence.memory_gb, or make divergence.context smaller."
        )
    waves: list[list[int]] = [[]]
    used = 0
    for number, length in enumerate(lengths):
        if waves[-1] and fixed + token * (used + length) > limit_bytes:
            waves.append([])
            used = 0
        waves[-1].append(number)
        used += length
    largest = max(sum(lengths[number] for number in wave) for wave in waves)
    return MemoryPlan(fixed, token, tuple(map(tuple, waves)), fixed + token * largest)


def disk_bytes(geometry: Geometry, tokens: int) -> int:
    """Return what hidden states and selections of two layers and the result take on disk."""
    return tokens * _FLOAT * (3 * geometry.hidden_size + 2 * geometry.index_topk)


def _layer_bytes(geometry: Geometry) -> int:
    """Return the largest layer without routed experts, in float32, and once more as stored."""
    sizes: dict[str, int] = {}
    for name, shape, _ in geometry.tensors():
        parts = name.split(".")
        if parts[1] == "layers" and ".mlp.experts." not in name:
            sizes[parts[2]] = sizes.get(parts[2], 0) + prod(shape)
    return max(sizes.values()) * (_FLOAT + 2)


def _mlp_bytes(geometry: Geometry) -> int:
    """Return the experts in flight and one block of tokens through the widest feed-forward."""
    expert = 3 * geometry.moe_intermediate_size * geometry.hidden_size
    width = max(
        geometry.intermediate_size, geometry.moe_intermediate_size * geometry.n_shared_experts
    )
    block = MLP_ROWS * (3 * width + 2 * geometry.hidden_size) * _FLOAT
    return expert * (2 * AHEAD + 2 * _FLOAT) + block


def _attention_bytes(geometry: Geometry, length: int, block_elements: int) -> int:
    """Return queries, keys, values and outputs of all heads, expanded, and the runtime's blocks."""
    head = geometry.qk_nope_head_dim + geometry.qk_rope_head_dim
    per_head = 3 * head + 2 * geometry.qk_nope_head_dim + 3 * geometry.v_head_dim
    index = geometry.index_n_heads * geometry.index_head_dim
    rows = geometry.num_attention_heads * per_head + 2 * index + 4 * geometry.hidden_size
    return _FLOAT * (length * rows + 4 * block_elements)


def _logit_bytes(geometry: Geometry) -> int:
    """Return two heads' columns, as stored and in float32, and four blocks of logits."""
    columns = 2 * LOGIT_COLUMNS * geometry.hidden_size * (_FLOAT + 2)
    return columns + 4 * LOGIT_ROWS * LOGIT_COLUMNS * _FLOAT
