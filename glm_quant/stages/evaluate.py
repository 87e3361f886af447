"""What the build can do."""

from glm_quant.evaluation.evaluate import evaluate, evaluation_inputs
from glm_quant.evaluation.records import EvaluationRecord
from glm_quant.fingerprint import Canonical
from glm_quant.quantize.convert import Progress
from glm_quant.stages.base import Stage


class EvaluationStage(Stage[EvaluationRecord]):
    """What the build can do, measured in a process of its own, within the recipe's bounds."""

    name = "evaluate"
    record_type = EvaluationRecord

    def inputs(self) -> Canonical:
        """Return the build, the settings, the texts, the baselines and the versions."""
        build = self.build
        return evaluation_inputs(
            build.workspace.checkpoint, build.recipe.evaluation, build.baselines
        )

    def make(self, progress: Progress) -> EvaluationRecord:
        """Measure.

        Raises:
            EvaluationError: the model crashed, or a bound is broken.
        """
        workspace, recipe = self.build.workspace, self.build.recipe
        return evaluate(
            workspace.checkpoint,
            recipe.evaluation,
            folder=workspace.records / "measurements",
            baselines=self.build.baselines,
            stage_fingerprint=self.fingerprint(),
            progress=progress,
        )

    def summarize(self, record: EvaluationRecord) -> str:
        """Return perplexity, needle score and decode speed."""
        found = record.measurements
        said = [f"perplexity {p.value:.3f}" for p in found.perplexity]
        if found.needle:
            said.append(f"needle {found.needle.score:.0%}")
        said += [f"{s.decode_rate:,.1f} tok/s after {s.prompt_tokens}" for s in found.speed[:1]]
        return ", ".join(said)
