"""What the inputs of each weight are, for a recipe that encodes with it."""

from glm_quant.build import Build
from glm_quant.calibration.build_calibration import STAGE as CALIBRATE
from glm_quant.calibration.build_calibration import (
    CalibrationRecord,
    calibrate_build,
    calibration_inputs,
)
from glm_quant.fingerprint import Canonical
from glm_quant.quantize.convert import Progress
from glm_quant.stages.base import Stage, StageResult


class CalibrateStage(Stage[CalibrationRecord]):
    """The importance of each weight's inputs, and their Hessians, where the recipe wants them."""

    name = CALIBRATE
    record_type = CalibrationRecord

    def __init__(self, build: Build, with_reference: bool = True) -> None:
        """Attach to a build.

        Args:
            build: whose recipe wants a calibration of its own.
            with_reference: make in the same pass what the divergence stage wants of the source.
        """
        super().__init__(build)
        self.with_reference = with_reference

    def inputs(self) -> Canonical:
        """Return the texts, the settings, and the source."""
        return calibration_inputs(self.build.checkpoint, self.build.recipe)

    def make(self, progress: Progress) -> CalibrationRecord:
        """Stream texts through the source, and the divergence stage's with them if it follows.

        Where the source is not a folder the weights are encoded on the way.

        Raises:
            RecipeError: a text cannot be read, or is one that is evaluated.
            EvaluationError: the memory is too small for the longest sequence.
        """
        build = self.build
        return calibrate_build(
            build.checkpoint,
            build.recipe,
            build.workspace,
            progress,
            reference=self.with_reference,
            converting=build.conversion if build.converts_while_calibrating else None,
        )

    def run(self, progress: Progress) -> StageResult:
        """Calibrate, then plan again: which codes a weight gets depends on what was measured."""
        result = super().run(progress)
        self.build.make_plan()
        return result

    def summarize(self, record: CalibrationRecord) -> str:
        """Return what was seen, and which experts met too little of it."""
        return (
            f"{record.tokens:,} tokens, {record.weights:,} weights, {record.factors:,} factors; "
            f"{record.thin:,} of {record.experts:,} experts met too few tokens of their own"
            f"{_worst_layer(record)}"
        )


def _worst_layer(record: CalibrationRecord) -> str:
    if not record.layers:
        return ""
    layer, error = max(record.layers.items(), key=lambda item: item[1].of_added)
    return (
        f"; encoded too, layer {layer} has the largest error: {error.of_added:.2%} of what it adds"
    )
