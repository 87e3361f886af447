"""The stages that prove and measure a build: parity, divergence, evaluate."""

from importlib.metadata import version
from pathlib import Path

from glm_quant.artifact import Record
from glm_quant.evaluation.baselines import Baseline, open_baseline
from glm_quant.evaluation.divergence import VERSION, build_folder, check_bounds
from glm_quant.evaluation.divergence_beside import compare_divergence
from glm_quant.evaluation.divergence_record import DivergenceRecord
from glm_quant.evaluation.evaluate import evaluate, evaluation_inputs
from glm_quant.evaluation.perplexity import digest_text
from glm_quant.evaluation.process import run_apart
from glm_quant.evaluation.records import EvaluationRecord
from glm_quant.evaluation.token_set import read_texts
from glm_quant.fingerprint import Canonical
from glm_quant.parity import ParityRecord, check_parity
from glm_quant.quantize.convert import Progress
from glm_quant.stages.base import Stage
from glm_quant.stages.divergence_worker import DivergenceRequest
from glm_quant.stages.making import AssembleStage


class ParityStageRecord(Record):
    """What the parity stage found."""

    found: ParityRecord


class ParityStage(Stage[ParityStageRecord]):
    """The build computes what the reference computes, within the recipe's bounds."""

    name = "parity"
    record_type = ParityStageRecord

    def inputs(self) -> Canonical:
        """Return the build and what it is compared with, how."""
        return {
            "build": AssembleStage(self.build).fingerprint(),
            **self.how(),
        }

    def how(self) -> dict[str, Canonical]:
        """Return how they are compared, whatever is compared."""
        return {
            "settings": self.build.recipe.parity.model_dump_json(),
            "versions": [version(name) for name in ("mlx", "mlx-lm", "transformers")],
        }

    def make(self, progress: Progress) -> ParityStageRecord:
        """Compare.

        Raises:
            ParityError: a bound is broken, or the reference is not installed.
        """
        workspace = self.build.workspace
        found = check_parity(
            self.build.checkpoint,
            workspace.checkpoint,
            self.build.recipe.parity,
            scratch=workspace.scratch,
        )
        progress(1, 1)
        return ParityStageRecord(fingerprint=self.fingerprint(), found=found)

    def summarize(self, record: ParityStageRecord) -> str:
        """Return what matters most: the runtime's error and the build's divergence."""
        found = record.found
        said = [f"{len(found.layers)} layers, largest error {found.max_layer_error:.1e}"]
        if found.logits:
            worst = max(found.logits.below_topk, found.logits.above_topk, found.logits.cached)
            said.append(f"logits within {worst:.1e} of transformers")
        if found.mean_kl is not None and found.top1_agreement is not None:
            said.append(f"build: KL {found.mean_kl:.4f}, top-1 {found.top1_agreement:.1%}")
        return "; ".join(said)


class DivergenceStage(Stage[DivergenceRecord]):
    """How far the build is from its bf16 source: streamed KL and perplexity, within bounds.

    A process of its own streams them.
    """

    name = "divergence"
    record_type = DivergenceRecord

    def inputs(self) -> Canonical:
        """Return the build, the settings, the baselines, and the source by way of the build."""
        return {"build": AssembleStage(self.build).fingerprint(), **self.how()}

    def how(self) -> dict[str, Canonical]:
        """Return how they are compared, whatever is compared."""
        settings = self.build.recipe.divergence
        return {
            "version": VERSION,
            "settings": settings.model_dump_json(exclude={"memory_gb", "references"}),
            "texts": {name: digest_text(text) for name, text in read_texts(settings).items()},
            "versions": [version(name) for name in ("mlx", "mlx-lm")],
            "baselines": [self._identity(baseline) for baseline in self._baselines()],
        }

    def make(self, progress: Progress) -> DivergenceRecord:
        """Compare.

        Raises:
            EvaluationError: a bound is broken, or the memory is too small.
        """
        found = self._measure(self.build.workspace.checkpoint, progress)
        folder = build_folder(self.build.workspace.divergence, found)
        comparisons = [
            comparison
            for baseline in self._baselines()
            if (other := self._beside(baseline, progress)) is not None
            for comparison in compare_divergence(baseline.name, (found, folder), other)
        ]
        found = found.model_copy(update={"comparisons": tuple(comparisons)})
        check_bounds(found, self.build.recipe.divergence)
        inside = folder.relative_to(self.root)
        outputs = [
            output.model_copy(update={"path": str(inside / output.path)})
            for output in found.outputs
        ]
        return found.model_copy(update={"fingerprint": self.fingerprint(), "outputs": outputs})

    def _measure(self, checkpoint: Path, progress: Progress) -> DivergenceRecord:
        build = self.build
        request = DivergenceRequest(
            source=build.checkpoint.source.uri,
            folder=build.workspace.divergence,
            checkpoint=checkpoint,
            settings=build.recipe.divergence,
        )
        what = f"{checkpoint}: the process that compares the build with its source"
        answer = run_apart("glm_quant.stages.divergence_worker", request, what, progress)
        return DivergenceRecord.model_validate_json(answer)

    def _baselines(self) -> list[Baseline]:
        return [open_baseline(name, at) for name, at in self.build.baselines.items()]

    def _identity(self, baseline: Baseline) -> Canonical:
        if self._is_streamed(baseline):
            return [baseline.name, baseline.identity, "streamed"]
        known = baseline.divergence()
        return [baseline.name, baseline.identity, known[0].fingerprint if known else None]

    def _beside(
        self, baseline: Baseline, progress: Progress
    ) -> tuple[DivergenceRecord, Path] | None:
        """Return a baseline's record and folder, if it has one or is to have one."""
        if not self._is_streamed(baseline):
            return baseline.divergence()
        record = self._measure(baseline.place, progress)
        return record, build_folder(self.build.workspace.divergence, record)

    def _is_streamed(self, baseline: Baseline) -> bool:
        """Whether the KL of a checkpoint is measured: it is of the same source, or a bound asks."""
        if baseline.evaluation is not None:
            return False
        bounds = self.build.recipe.divergence.bounds
        return baseline.is_of(self.build.checkpoint) or any(
            bound.baseline == baseline.name for bound in bounds
        )

    def summarize(self, record: DivergenceRecord) -> str:
        """Return KL, agreement and both perplexities."""
        row = record.row()
        return (
            f"KL {row.mean_kl.value:.4f} (99 % {row.p99_kl:.3f}), top-1 "
            f"{row.top1_agreement.value:.1%}, perplexity {row.build_perplexity.value:.3f}, source "
            f"{row.reference_perplexity.value:.3f}"
        )


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
