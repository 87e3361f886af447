"""How much memory a prompt takes while it is read, beside weights and caches: from dims alone.

mlx-lm reads a prompt in chunks; MLX allocates ahead of computing, so within a block all temporaries
are taken to live at once, the largest block counts, and blocks follow each other. The formulas
mirror the runtime (`glm_quant.model.glm_moe_dsa`): its choice between expanded and absorbed
attention, its blocks of at most BLOCK_ELEMENTS, and mlx-lm's SwitchGLU. A test holds the result
against `mx.get_peak_memory()` on small models.

The largest chunk need not be the last, since short contexts are
attended to with expanded keys, which take more memory than the gathered ones of long contexts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from glm_quant.model.geometry import Geometry

# mlx-lm's `--prefill-step-size`.
CHUNK = 2048
# As in the runtime, which cannot be imported for a number: it loads mlx. A test compares them.
BLOCK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Chunk:
    """New tokens after `past` cached ones; `item` is the bytes of a value."""

    past: int
    tokens: int
    item: int
    block_elements: int

    @property
    def total(self) -> int:
        """Keys that exist when the chunk is attended to."""
        return self.past + self.tokens

    def rows(self, elements_per_row: int) -> int:
        """Return how many query rows the runtime takes at a time."""
        return min(max(self.block_elements // elements_per_row, 1), self.tokens)


def prefill_bytes(
    geometry: Geometry,
    context: int,
    *,
    chunk: int = CHUNK,
    item: int = 2,
    block_elements: int = BLOCK_ELEMENTS,
) -> int:
    """Return the bytes that the hungriest chunk of a prompt takes.

    Args:
        geometry: the model's dims.
        context: tokens of the prompt.
        chunk: tokens that mlx-lm reads at a time.
        item: bytes of an activation: 2 for bfloat16, 4 for float32.
        block_elements: the runtime's bound on a temporary.
    """
    chunks = _candidates(geometry, Chunk(0, chunk, item, block_elements), context)
    return max(_chunk_bytes(geometry, each) for each in chunks)


def _candidates(geometry: Geometry, first: Chunk, context: int) -> Iterator[Chunk]:
    """Yield the chunks that can be the largest: as long as keys may be expanded, and the last."""
    starts = range(0, context, first.tokens)
    for past in starts:
        tokens = min(first.tokens, context - past)
        chunk = replace(first, past=past, tokens=tokens)
        yield chunk
        if chunk.total > geometry.index_topk and not _is_expanded(geometry, chunk):
            break
    for past in starts[-2:]:
        yield replace(first, past=past, tokens=min(first.tokens, context - past))


def _chunk_bytes(geometry: Geometry, at: Chunk) -> int:
    row = geometry.kv_lora_rank + geometry.qk_rope_head_dim + geometry.index_head_dim
    grown = at.total * row * at.item  # one layer's cache is copied while it grows
    stream = 3 * at.tokens * geometry.hidden_size * at.item  # residual, normed, output
    parts = (_attention(geometry, at), _selection(geometry, at), _experts(geometry, at))
    return grown + stream + max(parts)


def _queries(geometry: Geometry, at: Chunk) -> int:
    """Return the queries and the copy whose last dims are rotated."""
    width = geometry.qk_nope_head_dim + 2 * geometry.qk_rope_head_dim
    return at.tokens * geometry.num_attention_heads * width * at.item


def _attention(geometry: Geometry, at: Chunk) -> int:
    heads, value = geometry.num_attention_heads, geometry.v_head_dim
    outputs = 3 * at.tokens * heads * value * at.item  # blocks, joined, with heads side by side
    inner = _expanded if _is_expanded(geometry, at) else _absorbed
    return _queries(geometry, at) + outputs + inner(geometry, at)


def _is_expanded(geometry: Geometry, at: Chunk) -> bool:
    """Whether the runtime makes all heads' keys: `_expanding_is_cheaper`, in multiply-adds."""
    nope, rope, value = (
        geometry.qk_nope_head_dim,
        geometry.qk_rope_head_dim,
        geometry.v_head_dim,
    )
    mapping = (nope + value) * geometry.kv_lora_rank
    per_key = 2 * geometry.kv_lora_rank + rope
    sparse = at.total > geometry.index_topk
    keys = 2 * geometry.index_topk if sparse else at.total
    absorbed = at.tokens * (mapping + per_key * keys)
    return at.total * (mapping + at.tokens * (nope + rope + value)) < absorbed


def _expanded(geometry: Geometry, at: Chunk) -> int:
    heads = geometry.num_attention_heads
    nope, rope, value = (
        geometry.qk_nope_head_dim,
        geometry.qk_rope_head_dim,
        geometry.v_head_dim,
    )
    queries = at.tokens * heads * (nope + rope)
    keys = at.total * heads * (2 * nope + rope + value)
    rows = at.rows(heads * at.total)
    scores = 2 * rows * heads * at.total  # before and after the softmax
    mask = rows * at.total * (at.item + 1)
    return (queries + keys + scores) * at.item + mask


def _absorbed(geometry: Geometry, at: Chunk) -> int:
    heads, latent = geometry.num_attention_heads, geometry.kv_lora_rank
    width = latent + geometry.qk_rope_head_dim
    if at.total > geometry.index_topk:
        keys = geometry.index_topk
        rows = at.rows(keys * max(heads, width))
        gathered = rows * keys * width
    else:
        keys, gathered = at.total, 0
        rows = at.rows(heads * keys)
    block = gathered + 2 * rows * heads * (keys + latent)
    return block * at.item * (2 if rows < at.tokens else 1)  # at most two blocks live


def _selection(geometry: Geometry, at: Chunk) -> int:
    """Return what a full layer's indexer takes: float32 throughout."""
    if at.total <= geometry.index_topk:
        return 0
    heads, width = geometry.index_n_heads, geometry.index_head_dim
    rows = at.rows(heads * at.total)
    queries = 2 * at.tokens * heads * width
    keys = at.total * width
    scores = 2 * rows * heads * at.total + 3 * rows * at.total
    chosen = at.tokens * geometry.index_topk
    return _queries(geometry, at) + 4 * (queries + keys + scores + chosen)


def _experts(geometry: Geometry, at: Chunk) -> int:
    """Return what SwitchGLU takes: tokens sorted by expert, in, through and out, then weighted."""
    routed = at.tokens * geometry.num_experts_per_tok
    sorted_in_out = 3 * geometry.hidden_size * at.item
    weighted = 4 * geometry.hidden_size  # the router's weights are float32
    inside = 3 * geometry.moe_intermediate_size * at.item
    return routed * (sorted_in_out + weighted + inside)
