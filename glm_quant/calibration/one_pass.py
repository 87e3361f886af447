"""One pass that calibrates a build and converts it, and makes the reference of its divergence.

From the Hub or S3 the source is what everything waits for, so it is fetched once: layer by layer
its shards come near (`checkpoint.near` says in which order, and what that costs in bytes and disk),
the calibration's tokens and those of the divergence pass the layer, its energies and factors are
made, and its weights are encoded with them from the same files, on all cores, while the next
layer's shards come. The codes go to their places in the partial outputs, where the conversion
finds them done (`quantize.early_encode`): bytes are those of a conversion that comes after, and
what is finished when the process is killed stays. Besides the source's shards it needs no disk
that the build does not need anyway.
"""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from glm_quant.artifact import Record
from glm_quant.checkpoint.imatrix import Imatrix
from glm_quant.checkpoint.near import NearSource, Walk, nearing
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.litter import entries
from glm_quant.model.geometry import Geometry
from glm_quant.quantize.assemble import output_config
from glm_quant.quantize.convert import Conversion
from glm_quant.quantize.early_encode import EarlyEncoder
from glm_quant.quantize.plan import Plan, PlannedWeight, calibrated
from glm_quant.recipe import Recipe
from glm_quant.streaming.forward import Party, layer_gap
from glm_quant.streaming.weights import BuildWeights
from glm_quant.workspace import Workspace

# Sequences on which an encoded layer is held beside the source's: expanding its experts costs more
# than they do.
_SEQUENCES = 4


@contextmanager
def one_pass(
    checkpoint: Checkpoint, recipe: Recipe, conversion: Conversion
) -> Generator["OnePass"]:
    """Give who encodes the layers of a build while they are calibrated.

    Args:
        checkpoint: the source.
        recipe: wants a calibration of its own.
        conversion: of the recipe, its calibration not known yet.
    """
    checkpoint.require_weights()
    _ = checkpoint.tensors  # the headers are read once
    walk = walk_of(checkpoint)
    with (
        nearing(checkpoint, walk) as (near, held),
        EarlyEncoder(conversion, near) as encoder,
    ):
        yield OnePass(recipe, conversion.plan, near, held, encoder)


def walk_of(checkpoint: Checkpoint) -> Walk:
    """Return in which order a pass needs the shards of a checkpoint."""
    layers = Geometry.from_config(checkpoint.config).num_hidden_layers
    return Walk(checkpoint.index.weight_map, layers)


def source_bytes(checkpoint: Checkpoint, workspace: Workspace) -> int:
    """Return how much of the source a pass has on disk at most, less what is there already."""
    places = checkpoint.source.places
    if places is None or checkpoint.missing_shards:  # a plan needs none of them
        return 0
    sizes = {name: checkpoint.files[name].size_bytes for name in checkpoint.index.shards}
    here = sum(path.stat().st_size for path in entries(workspace.source))
    return max(0, walk_of(checkpoint).cost(sizes, places).disk_bytes - here)


class LayerError(BaseModel):
    """What quantizing a layer does to its output, on inputs from the source's own layers.

    Attributes:
        tokens: of the calibration's that were looked at.
        of_output: Σ|ŷ - y|² / Σ|y|², y being the hidden states after the layer.
        of_added: Σ|ŷ - y|² / Σ|y - x|², in units of what the layer itself gives.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    of_output: float
    of_added: float


class _LayerErrorRecord(Record):
    """A layer's error on disk; none where the layer was not encoded here."""

    error: LayerError | None


class OnePass:
    """Encodes a build layer by layer, as soon as each one's calibration is known."""

    def __init__(
        self, recipe: Recipe, plan: Plan, near: Checkpoint, held: NearSource, encoder: EarlyEncoder
    ) -> None:
        """Sort the plan's weights by layer; see `one_pass`."""
        self.near = near
        self.errors: dict[int, LayerError] = {}
        self._recipe, self._plan, self._held, self._encoder = recipe, plan, held, encoder
        walk = held.walk
        self._weights: list[list[PlannedWeight]] = [[] for _ in walk.layers]
        for planned in plan.weights:
            at = walk.place(planned.weight.parts[0].source)
            if at is not None:
                self._weights[at].append(planned)

    def enter(self, index: int) -> None:
        """Bring a layer near."""
        self._held.hold(index)

    def encode(self, index: int, imatrix: Imatrix) -> None:
        """Encode a layer, if it is not encoded yet.

        Args:
            index: which one.
            imatrix: has what its weights are calibrated with.
        """
        weights = calibrated(self._weights[index], self._recipe, imatrix)
        if self._encoder.pending_jobs(weights):
            self._held.hold(index)
            self._encoder.encode(weights)

    def measure(self, index: int, imatrix: Imatrix, party: Party, folder: Path) -> None:
        """Note what quantizing did to a layer's output, while the states before it are there.

        Args:
            index: which layer.
            imatrix: as `encode` got it.
            party: who has passed the source's layer.
            folder: where it is noted.
        """
        path = folder / f"error-{index:03d}.json"
        known = _LayerErrorRecord.load(path)
        if known is None or known.fingerprint != imatrix.record.fingerprint:
            known = _LayerErrorRecord(
                fingerprint=imatrix.record.fingerprint, error=self._measured(index, imatrix, party)
            )
            known.save(path)
        if known.error is not None:
            self.errors[index] = known.error

    def _measured(self, index: int, imatrix: Imatrix, party: Party) -> LayerError | None:
        weights = calibrated(self._weights[index], self._recipe, imatrix)
        if not self._encoder.is_encoded(weights):
            return None
        build = self._encoder.checkpoint(output_config(self.near.config, self._plan))
        gap = layer_gap(BuildWeights(build), party, index, _SEQUENCES)
        if gap is None:
            return None
        return LayerError(
            tokens=gap.tokens,
            of_output=gap.gap / gap.output,
            of_added=gap.gap / gap.added,
        )
