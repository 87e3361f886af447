"""The record of each finished output shard."""

from pydantic import BaseModel, ConfigDict, Field

from glm_quant.artifact import Record
from glm_quant.codes.fidelity import Fidelity


class ShardInputs(BaseModel):
    """Everything that decides the bytes of an output shard: what its fingerprint is made of.

    Attributes:
        version: of the encoder.
        layout: sha256 of the shard's header.
        schemes: of each weight that has a tensor in the shard, with its quantizer.
        sources: identity of each source shard that it draws on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    layout: str
    schemes: dict[str, str]
    sources: dict[str, str]


class RemoteShard(Record):
    """A finished shard that was deleted here because `target` has its bytes, proved there."""

    target: str


class ShardRecord(Record):
    """A finished output shard.

    Attributes:
        inputs: what the fingerprint was made of, so that a change can be named.
        tensors: sha256 of each tensor's bytes.
        sources: for each source tensor, the sha256 of the row blocks that were read, in order.
        keys: for each weight, the hash of all that decides its bytes (`outputs.weight_key`).
        fidelity: how near the codes of each quantized weight are to it.
    """

    inputs: ShardInputs
    tensors: dict[str, str]
    sources: dict[str, list[str]]
    keys: dict[str, str] = Field(default_factory=dict[str, str])
    fidelity: dict[str, Fidelity] = Field(default_factory=dict[str, Fidelity])
