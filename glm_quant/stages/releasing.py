"""The stage that tells people of a build: card."""

import hashlib
from importlib.resources import files
from pathlib import Path

from glm_quant.artifact import FileDigest, Record
from glm_quant.build import Build
from glm_quant.fingerprint import Canonical
from glm_quant.quantize.assemble import source_label
from glm_quant.quantize.convert import Progress
from glm_quant.report.card import BuildFacts, CardInputs, PlanFacts, SourceFacts, write_card
from glm_quant.report.correctness import layer_errors, parity_rows
from glm_quant.stages.base import Stage
from glm_quant.stages.making import AssembleStage, DownloadStage, PlanStage
from glm_quant.stages.proving import DivergenceStage, EvaluationStage, ParityStage


class CardRecord(Record):
    """The card and its charts."""


class CardStage(Stage[CardRecord]):
    """README.md and charts, from records and nothing else."""

    name = "card"
    record_type = CardRecord

    @property
    def root(self) -> Path:
        """The checkpoint folder."""
        return self.build.workspace.checkpoint

    def inputs(self) -> Canonical:
        """Return what the card tells of, and the code that tells it."""
        return {
            "assemble": AssembleStage(self.build).fingerprint(),
            "parity": ParityStage(self.build).fingerprint(),
            "divergence": DivergenceStage(self.build).fingerprint(),
            "evaluate": EvaluationStage(self.build).fingerprint(),
            "recipe": self.build.recipe.model_dump_json(),
            "report": {
                entry.name: hashlib.sha256(entry.read_bytes()).hexdigest()
                for entry in files("glm_quant.report").iterdir()
                if entry.is_file()
            },
        }

    def make(self, progress: Progress) -> CardRecord:
        """Render.

        Raises:
            CardError: a record is missing.
        """
        written = write_card(card_inputs(self.build), self.root)
        progress(1, 1)
        return CardRecord(
            fingerprint=self.fingerprint(),
            outputs=[FileDigest.of(self.root, file) for file in written],
        )

    def summarize(self, record: CardRecord) -> str:
        """Return how many files."""
        return f"{record.outputs[0].path} and {len(record.outputs) - 1} more files"


def card_inputs(build: Build) -> CardInputs:
    """Return what the records tell; what was not recorded is None."""
    source, made = DownloadStage(build).current(), AssembleStage(build).current()
    plan, parity = PlanStage(build).current(), ParityStage(build).current()
    command = f"glm-quant run {build.recipe.name} --source {source_label(build.checkpoint)}"
    return CardInputs(
        recipe=build.recipe,
        command=command,
        source=source
        and SourceFacts(
            source.uri, source.revision, source.shards, source.tensors, source.size_bytes
        ),
        plan=plan
        and PlanFacts(
            build.plan.geometry,
            tuple(plan.plan.groups),
            plan.plan.params,
            plan.plan.tensor_bytes,
            plan.plan.tensors,
            plan.plan.dropped,
            int(build.checkpoint.config.get("max_position_embeddings", 0)),
        ),
        build=made
        and BuildFacts(
            len(build.plan.shards),
            made.size_bytes,
            made.manifest_sha256,
            made.weights_fingerprint,
            made.versions,
        ),
        parity=parity and parity_rows(parity.found),
        divergence=DivergenceStage(build).current(),
        evaluation=EvaluationStage(build).current(),
        layer_errors=layer_errors(parity.found) if parity else (),
    )
