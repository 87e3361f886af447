"""How far the build is from its source."""

import logging
from importlib.metadata import version
from pathlib import Path

from glm_quant.child_process import run_in_child
from glm_quant.evaluation.baselines import Baseline, open_baseline
from glm_quant.evaluation.divergence import VERSION, build_folder, check_bounds
from glm_quant.evaluation.divergence_beside import compare_divergence
from glm_quant.evaluation.divergence_record import DivergenceRecord
from glm_quant.evaluation.perplexity import digest_text
from glm_quant.evaluation.token_set import read_texts
from glm_quant.fingerprint import Canonical
from glm_quant.quantize.convert import Progress
from glm_quant.stages.assemble import AssembleStage
from glm_quant.stages.base import Stage
from glm_quant.stages.child_jobs import DIVERGENCE_JOB, DivergenceRequest
from glm_quant.stages.verify import VerifyStage

_log = logging.getLogger(__name__)


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
            if (other := self._beside(baseline, found.reference, progress)) is not None
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
        return run_in_child(DIVERGENCE_JOB, request, checkpoint, progress)

    def _baselines(self) -> list[Baseline]:
        return [open_baseline(name, at) for name, at in self.build.baselines.items()]

    def _identity(self, baseline: Baseline) -> Canonical:
        known, streamed = baseline.divergence(), self._is_streamed(baseline)
        fingerprint = known[0].fingerprint if known else None
        return [baseline.name, baseline.identity, fingerprint, "streamed" if streamed else ""]

    def _beside(
        self, baseline: Baseline, reference: str, progress: Progress
    ) -> tuple[DivergenceRecord, Path] | None:
        """Return a baseline's record and folder, if it has one or is to have one.

        Args:
            baseline: to compare with.
            reference: the key of source and tokens that this build was compared on.
            progress: sees it measured.
        """
        known = baseline.divergence()
        if known is not None and known[0].reference == reference:
            return known
        if baseline.checkpoint is None or not self._is_streamed(baseline):
            _log.warning(
                "divergence: baseline %r has no KL to this source on these tokens, and no "
                "checkpoint of this source to measure it on: its column stays empty",
                baseline.name,
            )
            return None
        record = self._measure(baseline.checkpoint, progress)
        return record, build_folder(self.build.workspace.divergence, record)

    def _is_streamed(self, baseline: Baseline) -> bool:
        """Whether the KL of a checkpoint is measured: it is of the same source, or a bound asks."""
        if baseline.checkpoint is None:
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


class AssessDivergenceStage(DivergenceStage):
    """Divergence of a build that the manifest, not a plan, identifies."""

    def inputs(self) -> Canonical:
        """Return the build's manifest, its source, and how they are compared."""
        return {
            "build": VerifyStage(self.build).inputs(),
            "source": self.build.checkpoint.source.uri,
            "how": self.how(),
        }
