"""What other public builds' own cards say: sizes for a chart, figures beside those measured here.

A figure of another card stands beside ours only where the protocol
is the same, to the number of samples and the seed. It was not measured here, and the card says so.
"""

from functools import cache
from importlib.resources import files

import yaml
from pydantic import BaseModel, ConfigDict

from glm_quant.evaluation.records import Measurements


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Protocol(_Part):
    """How the published figures were measured, as their cards say."""

    dataset: str
    sequence_length: int
    samples: int
    seed: int
    shots: int
    limit: int


class PublicBuild(_Part):
    """A build as its card or file list shows it.

    Attributes:
        source: where, without https://.
        figures: `peer_perplexity`, or the name of a task in lm-evaluation-harness.
    """

    name: str
    size_gb: float
    source: str
    figures: dict[str, float] = {}


class PublicBuilds(_Part):
    """Public builds of one model.

    Attributes:
        params: of the model; builds of another size are not comparable.
        date: when their pages were read.
    """

    params: int
    date: str
    protocol: Protocol
    builds: tuple[PublicBuild, ...]


@cache
def public_builds() -> PublicBuilds:
    """Return what is known of other builds."""
    text = files("glm_quant.report").joinpath("builds.yaml").read_text(encoding="utf-8")
    return PublicBuilds.model_validate(yaml.safe_load(text))


def builds_of(params: int) -> tuple[PublicBuild, ...]:
    """Return the public builds of a model with so many parameters."""
    public = public_builds()
    return public.builds if params == public.params else ()


def comparable(measured: Measurements) -> set[str]:
    """Return the figures of a build that were measured as the published ones were."""
    protocol, names = public_builds().protocol, set[str]()
    peer, harness = measured.peer_perplexity, measured.harness
    if peer is not None:
        asked = (protocol.dataset, protocol.sequence_length, protocol.samples, protocol.seed)
        if (peer.dataset, peer.sequence_length, peer.samples, peer.seed) == asked:
            names.add("peer_perplexity")
    if harness is not None and (harness.shots, harness.limit) == (protocol.shots, protocol.limit):
        names |= {task.task for task in harness.tasks if task.dataset_sha256 is None}
    return names
