"""The build computes what the reference computes."""

from importlib.metadata import version

from glm_quant.artifact import Record
from glm_quant.child_process import run_in_child
from glm_quant.fingerprint import Canonical
from glm_quant.parity.check import ParityRecord
from glm_quant.quantize.convert import Progress
from glm_quant.stages.assemble import AssembleStage
from glm_quant.stages.base import Stage
from glm_quant.stages.child_jobs import PARITY_JOB, ParityRequest
from glm_quant.stages.verify import VerifyStage


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
        """Compare, in a process of its own.

        Raises:
            ParityError: a bound is broken, the reference is not installed, or the process crashed.
        """
        workspace = self.build.workspace
        request = ParityRequest(
            source=self.build.checkpoint.source.uri,
            workspace=workspace.root,
            checkpoint=workspace.checkpoint,
            window=self.build.spec.window,
            settings=self.build.recipe.parity,
        )
        record = run_in_child(PARITY_JOB, request, workspace.checkpoint, progress)
        return ParityStageRecord(fingerprint=self.fingerprint(), found=record)

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


class AssessParityStage(ParityStage):
    """Parity of a build that the manifest, not a plan, identifies."""

    def inputs(self) -> Canonical:
        """Return the build's manifest, its source, and how they are compared."""
        return {
            "build": VerifyStage(self.build).inputs(),
            "source": self.build.checkpoint.source.uri,
            "how": self.how(),
        }
