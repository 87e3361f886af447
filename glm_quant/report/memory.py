"""How much memory a build needs at which context, from its dims alone.

A machine sold as "256 GB" has 256 · 2³⁰ bytes = 274.9 GB, while file
sizes count 10⁹; here everything is bytes and only the labels round.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml
from pydantic import BaseModel, ConfigDict

from glm_quant.model.geometry import Geometry
from glm_quant.report.prefill import prefill_bytes

_CONTEXTS = (8 << 10, 32 << 10, 128 << 10, 1 << 20)
_GROUP = 64
_STEP = 256  # mlx-lm's caches grow by as many tokens


class Seen(BaseModel):
    """What a machine of so many GB was seen to let its GPU wire, in GiB."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gigabytes: int
    wired: float
    system: str
    source: str


class Machines(BaseModel):
    """What is known of the machines that a build may run on, and from where.

    Attributes:
        gigabytes: the sizes that Apple has sold for models of this class, in GiB.
        wired_share: the part of the memory that macOS lets the GPU wire by default.
        wired_source: who says so.
        wired_seen: what a newer system was seen to allow.
        reserved: GiB left for the system when the limit is raised: an assumption.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gigabytes: tuple[int, ...]
    wired_share: float
    wired_source: str
    wired_seen: Seen
    reserved: int


@cache
def machines() -> Machines:
    """Return what is known of machines."""
    text = files("glm_quant.report").joinpath("machines.yaml").read_text(encoding="utf-8")
    return Machines.model_validate(yaml.safe_load(text))


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a context of `context` tokens needs.

    Attributes:
        latent_bytes: MLA's cache, normed latents and roped keys, 16-bit.
        indexer_bytes: the indexer's keys on full layers, 16-bit.
        prefill_bytes: what comes on top while a prompt of that length is read.
        cache_8bit_bytes: both caches as `--kv-bits 8` stores them, None where it cannot.
    """

    context: int
    weight_bytes: int
    latent_bytes: int
    indexer_bytes: int
    prefill_bytes: int
    cache_8bit_bytes: int | None

    @property
    def total_bytes(self) -> int:
        """The peak with 16-bit caches."""
        return self.weight_bytes + self.latent_bytes + self.indexer_bytes + self.prefill_bytes

    @property
    def total_8bit_bytes(self) -> int | None:
        """The peak with 8-bit caches, None where `--kv-bits 8` does not work."""
        cache = self.cache_8bit_bytes
        return None if cache is None else self.weight_bytes + cache + self.prefill_bytes


def latent_bytes_per_token(geometry: Geometry) -> int:
    """Return the 16-bit bytes that MLA caches for a token: its latent and its roped key."""
    width = geometry.kv_lora_rank + geometry.qk_rope_head_dim
    return 2 * width * geometry.num_hidden_layers


def indexer_bytes_per_token(geometry: Geometry) -> int:
    """Return the 16-bit bytes that the indexers cache for a token; shared layers have none."""
    return 2 * geometry.index_head_dim * geometry.indexer_types.count("full")


def cache_8bit_bytes_per_token(geometry: Geometry) -> int | None:
    """Return the bytes of all caches for a token in 8 bits, groups of 64 with scale and bias.

    The runtime's cache holds a row of latents, and a row of roped key and, on full layers, indexer
    key; each row is quantized by itself. None when a row is no multiple of 64.
    """
    total = 0
    for kind in geometry.indexer_types:
        side = geometry.qk_rope_head_dim + (geometry.index_head_dim if kind == "full" else 0)
        for row in (geometry.kv_lora_rank, side):
            if row % _GROUP:
                return None
            total += row + 4 * row // _GROUP
    return total


def memory_need(geometry: Geometry, weight_bytes: int, context: int) -> MemoryNeed:
    """Return what `context` tokens need beside the weights."""
    narrow = cache_8bit_bytes_per_token(geometry)
    return MemoryNeed(
        context=context,
        weight_bytes=weight_bytes,
        latent_bytes=context * latent_bytes_per_token(geometry),
        indexer_bytes=context * indexer_bytes_per_token(geometry),
        prefill_bytes=prefill_bytes(geometry, context),
        cache_8bit_bytes=None if narrow is None else context * narrow,
    )


def memory_needs(geometry: Geometry, weight_bytes: int, limit: int) -> list[MemoryNeed]:
    """Return the need at 8K, 32K, 128K and 1M tokens, as far as the model's `limit` goes.

    A model that ends below 32K is shown at a quarter, half and all of its limit; without a limit
    in its config it is taken to have 32K.
    """
    limit = limit or 32 << 10
    contexts: Sequence[int] = [context for context in _CONTEXTS if context <= limit]
    if len(contexts) < 2:
        contexts = [limit // 4, limit // 2, limit]
    return [memory_need(geometry, weight_bytes, context) for context in contexts]


def machine_bytes(gigabytes: int) -> int:
    """Return the bytes of a machine sold with so many GB."""
    return gigabytes << 30


def reserved_bytes() -> int:
    """Return what is left for the system when the wired limit is raised: an assumption."""
    return machine_bytes(machines().reserved)


@dataclass(frozen=True)
class MachineFit:
    """The longest context, in tokens, that a machine holds beside the weights; 0 for none.

    Attributes:
        by_default: within macOS's default wired share, 16-bit caches.
        raised: with the wired limit raised to all but the reserve, 16-bit caches.
        raised_8bit: the same with 8-bit caches.
    """

    gigabytes: int
    by_default: int
    raised: int
    raised_8bit: int | None


def machine_fits(geometry: Geometry, weight_bytes: int, limit: int) -> list[MachineFit]:
    """Return what each machine can hold."""
    specs = machines()

    def longest(available: float, narrow: bool = False) -> int:
        def need(context: int) -> float:
            whole = memory_need(geometry, weight_bytes, context)
            narrowed = whole.total_8bit_bytes
            return whole.total_bytes if not narrow or narrowed is None else narrowed

        contexts = range(_STEP, limit + 1, _STEP)
        return bisect_right(contexts, available, key=need) * _STEP

    fits: list[MachineFit] = []
    for gigabytes in specs.gigabytes:
        memory = machine_bytes(gigabytes)
        free = memory - reserved_bytes()
        narrow = cache_8bit_bytes_per_token(geometry) is not None
        fits.append(
            MachineFit(
                gigabytes,
                longest(memory * specs.wired_share),
                longest(free),
                longest(free, narrow=True) if narrow else None,
            )
        )
    return fits


def active_params(
    geometry: Geometry, params: int, routed_params: int, embedding_params: int
) -> int:
    """Return the parameters that a token passes: the embedding is looked up, not multiplied."""
    idle = 1 - geometry.num_experts_per_tok / geometry.n_routed_experts
    return params - embedding_params - round(routed_params * idle)
