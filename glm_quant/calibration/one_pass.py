"""One pass that calibrates a build and converts it, and makes the reference of its divergence.

From the Hub or S3 the source is what everything waits for, so it is fetched once: layer by layer
its shards come here (`checkpoint.layer_window` has the order, and its cost in bytes and disk),
the tokens of calibration and divergence pass the layer, its importance and Hessian factors are
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
from glm_quant.checkpoint.layer_window import LayerWindow, ShardOrder, open_layer_window
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.litter import entries
from glm_quant.model.geometry import Geometry
from glm_quant.quantize.assemble import output_config
from glm_quant.quantize.convert import Conversion
from glm_quant.quantize.early_encode import EarlyEncoder
from glm_quant.quantize.layout import PlannedWeight
from glm_quant.quantize.plan import Plan, calibrated
from glm_quant.recipe import Recipe
from glm_quant.streaming.forward import TokenBatch, layer_gap
from glm_quant.streaming.weights import BuildWeights
from glm_quant.workspace import Workspace

# Sequences on which an encoded layer is held beside the source's: expanding its experts costs more
# than they do.
_SEQUENCES = 4


@contextmanager
def one_pass(
    checkpoint: Checkpoint, recipe: Recipe, conversion: Conversion
) -> Generator["OnePass"]:
    """Open a pass that encodes the layers of a build while they are calibrated.

    Args:
        checkpoint: the source.
        recipe: wants a calibration of its own.
        conversion: of the recipe, its calibration not known yet.
    """
    checkpoint.require_weights()
    _ = checkpoint.tensors  # the headers are read once
    order = shard_order(checkpoint)
    with (
        open_layer_window(checkpoint, order) as (windowed, window),
        EarlyEncoder(conversion, windowed) as encoder,
    ):
        yield OnePass(recipe, conversion.plan, windowed, window, encoder)


def shard_order(checkpoint: Checkpoint) -> ShardOrder:
    """Return in which order a pass needs the shards of a checkpoint."""
    layers = Geometry.from_config(checkpoint.config).num_hidden_layers
    return ShardOrder(checkpoint.index.weight_map, layers)


def source_bytes(checkpoint: Checkpoint, workspace: Workspace) -> int:
    """Return how much of the source a pass has on disk at most, less what is there already."""
    places = checkpoint.source.places
    if places is None or checkpoint.missing_shards:  # a plan needs none of them
        return 0
    sizes = {name: checkpoint.files[name].size_bytes for name in checkpoint.index.shards}
    local_bytes = sum(path.stat().st_size for path in entries(workspace.source))
    return max(0, shard_order(checkpoint).cost(sizes, places).disk_bytes - local_bytes)


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
        self,
        recipe: Recipe,
        plan: Plan,
        checkpoint: Checkpoint,
        window: LayerWindow,
        encoder: EarlyEncoder,
    ) -> None:
        """Sort the plan's weights by layer; see `one_pass`."""
        self.checkpoint = checkpoint
        self.errors: dict[int, LayerError] = {}
        self._recipe, self._plan, self._window, self._encoder = recipe, plan, window, encoder
        order = window.order
        self._weights: list[list[PlannedWeight]] = [[] for _ in order.layers]
        for planned in plan.weights:
            layer = order.place(planned.weight.segments[0].source)
            if layer is not None:
                self._weights[layer].append(planned)

    def before_layer(self, index: int) -> None:
        """Fetch a layer's shards."""
        self._window.load(index)

    def encode(self, index: int, imatrix: Imatrix) -> None:
        """Encode a layer, if it is not encoded yet.

        Args:
            index: which one.
            imatrix: has what its weights are calibrated with.
        """
        weights = calibrated(self._weights[index], self._recipe, imatrix)
        if self._encoder.pending_jobs(weights):
            # After an interruption the layer was passed before, and its shards may be gone.
            self._window.load(index)
            self._encoder.encode(weights)

    def measure(self, index: int, imatrix: Imatrix, batch: TokenBatch, folder: Path) -> None:
        """Record what quantizing did to a layer's output, while the states before it stand.

        Args:
            index: which layer.
            imatrix: as `encode` got it.
            batch: the calibration's, which has passed the source's layer.
            folder: for the record.
        """
        path = folder / f"error-{index:03d}.json"
        record = _LayerErrorRecord.load(path)
        # On disk, since a resumed pass no longer has the states before the layer.
        if record is None or record.fingerprint != imatrix.record.fingerprint:
            record = _LayerErrorRecord(
                fingerprint=imatrix.record.fingerprint,
                error=self._layer_error(index, imatrix, batch),
            )
            record.save(path)
        if record.error is not None:
            self.errors[index] = record.error

    def _layer_error(self, index: int, imatrix: Imatrix, batch: TokenBatch) -> LayerError | None:
        weights = calibrated(self._weights[index], self._recipe, imatrix)
        if not self._encoder.is_encoded(weights):
            return None
        build = self._encoder.checkpoint(output_config(self.checkpoint.config, self._plan))
        gap = layer_gap(BuildWeights(build), batch, index, _SEQUENCES)
        if gap is None:
            return None
        return LayerError(
            tokens=gap.tokens,
            of_output=gap.gap / gap.output,
            of_added=gap.gap / gap.added,
        )
