"""The model card. It needs the workspace alone, not the source."""

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from glm_quant.artifact import FileDigest, Record
from glm_quant.checkpoint.manifest import MANIFEST_NAME, Manifest, load_manifest
from glm_quant.errors import CardError
from glm_quant.evaluation.divergence_record import DivergenceRecord
from glm_quant.evaluation.records import EvaluationRecord
from glm_quant.fingerprint import Canonical, fingerprint
from glm_quant.model.geometry import Geometry
from glm_quant.quantize.convert import Progress
from glm_quant.recipe import Recipe
from glm_quant.report.correctness import layer_errors, parity_rows
from glm_quant.report.inputs import (
    BuildFacts,
    CardInputs,
    PlanFacts,
    SourceFacts,
    missing_record,
)
from glm_quant.stages.assemble import AssembleStage, BuildRecord
from glm_quant.stages.base import Stage
from glm_quant.stages.divergence import DivergenceStage
from glm_quant.stages.download import SourceRecord
from glm_quant.stages.evaluate import EvaluationStage
from glm_quant.stages.parity import ParityStage, ParityStageRecord
from glm_quant.stages.plan import PlanRecord
from glm_quant.workspace import Workspace

_CONFIG = "config.json"


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
        stages = (AssembleStage, ParityStage, DivergenceStage, EvaluationStage)
        told = {stage.name: stage(self.build).fingerprint() for stage in stages}
        return _inputs(told, self.build.recipe)

    def make(self, progress: Progress) -> CardRecord:
        """Render.

        Raises:
            CardError: a record is missing.
        """
        from glm_quant.report.card import write_card  # matplotlib, which takes a second

        written = write_card(card_inputs(self.build.workspace), self.root)
        progress(1, 1)
        return _record(self.fingerprint(), self.root, written)

    def summarize(self, record: CardRecord) -> str:
        """Return how many files."""
        return f"{record.outputs[0].path} and {len(record.outputs) - 1} more files"


def render_again(workspace: Workspace) -> CardRecord:
    """Render the card of a finished build anew: nothing is measured, the source is not asked.

    A later run finds the card as if the stage had made it.

    Raises:
        BusyError: a run is working in the workspace.
        CardError: a record is missing; it is named.
        IntegrityError: config or manifest are not those of the build.
    """
    from glm_quant.report.card import write_card

    with workspace.locked():
        records = BuildRecords.read(workspace)
        inputs = records.inputs(workspace)
        written = write_card(inputs, workspace.checkpoint)
        fresh = records.card_fingerprint(inputs.recipe)
        record = _record(fresh, workspace.checkpoint, written)
        record.save(workspace.records / f"{CardStage.name}.json")
        return record


def card_inputs(workspace: Workspace) -> CardInputs:
    """Return what the records of a workspace tell; what was not recorded is None.

    Raises:
        CardError: nothing was assembled, or a record is of another build.
        IntegrityError: config or manifest are not those that were recorded.
    """
    return BuildRecords.read(workspace).inputs(workspace)


@dataclass(frozen=True)
class BuildRecords:
    """What stands in a workspace's `records/` of one build; what is absent or damaged is None."""

    source: SourceRecord | None
    plan: PlanRecord | None
    assemble: BuildRecord | None
    parity: ParityStageRecord | None
    divergence: DivergenceRecord | None
    evaluate: EvaluationRecord | None

    @classmethod
    def read(cls, workspace: Workspace) -> Self:
        """Read them."""
        folder = workspace.records
        return cls(
            SourceRecord.load(folder / "download.json"),
            PlanRecord.load(folder / "plan.json"),
            BuildRecord.load(folder / "assemble.json"),
            ParityStageRecord.load(folder / "parity.json"),
            DivergenceRecord.load(folder / "divergence.json"),
            EvaluationRecord.load(folder / "evaluate.json"),
        )

    def card_fingerprint(self, recipe: Recipe) -> str:
        """Return the fingerprint of the card that these records give."""
        inputs = _inputs(self.fingerprints(), recipe)
        return fingerprint({"stage": CardStage.name, "inputs": inputs})

    def fingerprints(self) -> dict[str, str]:
        """Return those of the stages that a card tells of."""
        stages = {
            "assemble": self.assemble,
            "parity": self.parity,
            "divergence": self.divergence,
            "evaluate": self.evaluate,
        }
        return {name: record.fingerprint for name, record in stages.items() if record is not None}

    def inputs(self, workspace: Workspace) -> CardInputs:
        """Return what they tell, see `card_inputs`."""
        made, source = self.assemble, self.source
        if made is None:
            raise missing_record(workspace.root.name, "assemble")
        if self.divergence is not None and self.divergence.build != made.manifest_sha256:
            raise CardError(
                f"{workspace.records / 'divergence.json'}: it is of the build whose manifest has "
                f"sha256 {self.divergence.build}, the workspace has {made.manifest_sha256}. Run "
                "the flow again: it measures this build."
            )
        for output in made.outputs:
            if output.path in (_CONFIG, MANIFEST_NAME):
                output.check(workspace.checkpoint)
        manifest = load_manifest(workspace.checkpoint)
        recipe = recipe_of(manifest, workspace)
        return CardInputs(
            recipe=recipe,
            command=f"glm-quant run {recipe.name} --source {manifest.source}",
            source=source
            and SourceFacts(
                source.uri, source.revision, source.shards, source.tensors, source.size_bytes
            ),
            plan=self.plan and _plan_facts(self.plan, workspace.checkpoint),
            build=BuildFacts(
                len(manifest.shards),
                made.size_bytes,
                made.manifest_sha256,
                made.weights_fingerprint,
                made.versions,
            ),
            parity=self.parity and parity_rows(self.parity.found),
            divergence=self.divergence,
            evaluation=self.evaluate,
            layer_errors=layer_errors(self.parity.found) if self.parity else (),
        )


def recipe_of(manifest: Manifest, workspace: Workspace) -> Recipe:
    """Return the recipe that a build was made with.

    Raises:
        CardError: it was written by another version.
    """
    try:
        return Recipe.model_validate(manifest.recipe)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CardError(
            f"{workspace.checkpoint / MANIFEST_NAME}: the recipe in it was written by another "
            f"version of glm-quant ({where}: {first['msg']}). Use that version, or run the flow "
            "again with this one."
        ) from None


def _plan_facts(record: PlanRecord, checkpoint: Path) -> PlanFacts:
    config: dict[str, Any] = json.loads((checkpoint / _CONFIG).read_text(encoding="utf-8"))
    plan = record.plan
    return PlanFacts(
        Geometry.from_config(config),
        tuple(plan.groups),
        plan.params,
        plan.tensor_bytes,
        plan.tensors,
        plan.dropped,
        int(config.get("max_position_embeddings", 0)),
    )


def _inputs(told: dict[str, str], recipe: Recipe) -> Canonical:
    """Return what decides a card: the stages that it tells of, and the code that tells it."""
    report: dict[str, Canonical] = {
        entry.name: hashlib.sha256(entry.read_bytes()).hexdigest()
        for entry in files("glm_quant.report").iterdir()
        if entry.is_file()
    }
    return {**told, "recipe": recipe.model_dump_json(), "report": report}


def _record(made_from: str, root: Path, written: list[str]) -> CardRecord:
    return CardRecord(
        fingerprint=made_from, outputs=[FileDigest.of(root, file) for file in written]
    )
