"""The verified build and its card, at the targets."""

import math
from dataclasses import dataclass
from pathlib import Path

from glm_quant.artifact import FileDigest, Record
from glm_quant.build import Build
from glm_quant.checkpoint.manifest import load_manifest
from glm_quant.errors import EvaluationError, ParityError, PublishError
from glm_quant.evaluation.divergence import check_bounds as check_divergence
from glm_quant.evaluation.divergence_record import DivergenceRecord
from glm_quant.evaluation.evaluate import check_bounds
from glm_quant.evaluation.records import EvaluationRecord
from glm_quant.fingerprint import Canonical, fingerprint
from glm_quant.hub.license import require_license
from glm_quant.hub.retry import Patience
from glm_quant.hub.target import Diff, Published, compare
from glm_quant.parity.check import enforce
from glm_quant.quantize.convert import Progress
from glm_quant.quantize.verify import verify
from glm_quant.recipe import Recipe
from glm_quant.stages.assemble import AssembleStage, BuildRecord
from glm_quant.stages.base import Stage
from glm_quant.stages.card import CardRecord, CardStage
from glm_quant.stages.divergence import DivergenceStage
from glm_quant.stages.evaluate import EvaluationStage
from glm_quant.stages.parity import ParityStage, ParityStageRecord
from glm_quant.stages.upload import build_id, is_folder
from glm_quant.workspace import Workspace

# Size and time of change of every file of the builds that this process has verified.
_verified: set[tuple[tuple[str, int, int], ...]] = set()


# For a question whose answer only saves work.
_QUICK = Patience(tries=2)


class PublishRecord(Record):
    """A published build.

    Attributes:
        target: its address as the recipe or the command gave it.
        revision: the target's own name of what was published; empty for a folder.
        url: where a person finds it.
        contents: every file of it. A folder's are outputs too, an elsewhere's are asked for.
        change: what the last act changed, in words.
    """

    target: str
    revision: str
    url: str
    contents: list[FileDigest]
    change: str


class PublishStage(Stage[PublishRecord]):
    """The verified build and its card, at one target, all at once."""

    name = "publish"
    record_type = PublishRecord

    def __init__(self, build: Build, target: str) -> None:
        """Attach to a build and a target."""
        super().__init__(build)
        self.target = target

    @property
    def title(self) -> str:
        """Which part this is: publish to hf://org/name."""
        return f"publish to {self.target}"

    @property
    def record_path(self) -> Path:
        """Where the record stands: one a target."""
        return publish_record_path(self.build.workspace, self.target)

    @property
    def root(self) -> Path:
        """The target folder, where it is one."""
        return Path(self.target.removeprefix("file://")).expanduser().absolute()

    def inputs(self) -> Canonical:
        """Return the card, which depends on all that came before, and the target."""
        return publish_inputs(CardStage(self.build).fingerprint(), self.target)

    def is_whole(self, record: PublishRecord) -> bool:
        """Whether the target still shows the build: a folder is looked at, any other is asked."""
        if is_folder(self.target):
            return record.is_whole(self.root)
        try:
            target = self.build.open_target(self.target, build_id(self.build), patience=_QUICK)
            there = target.visible().files
        except PublishError:
            return False
        return compare(self.build.workspace.checkpoint, record.contents, there).is_empty

    def make(self, progress: Progress) -> PublishRecord:
        """Check what must be true, verify every byte once more, then publish.

        Raises:
            IntegrityError: the build is not what was recorded.
            PublishError: it may not be published, or the target refuses.
        """
        files = publishable_files(self.build)
        target = self.build.open_target(self.target, build_id(self.build))
        published = target.publish(self.build.workspace.checkpoint, files)
        progress(1, 1)
        return publish_record(self.fingerprint(), self.target, files, published)

    def diff(self) -> Diff:
        """Return what publishing would change, after the same checks; nothing is written.

        Raises:
            IntegrityError: the build is not what was recorded.
            PublishError: it may not be published, or the target cannot be reached.
        """
        files = publishable_files(self.build)
        there = self.build.open_target(self.target, build_id(self.build)).visible().files
        return compare(self.build.workspace.checkpoint, files, there)

    def summarize(self, record: PublishRecord) -> str:
        """Return where it is, and what changed there."""
        where = record.target if is_folder(record.target) else record.url
        return f"{len(record.contents)} files at {where}: {record.change}"


def publish_inputs(card: str, target: str) -> Canonical:
    """Return what decides what a target shows: the card's fingerprint stands for all before it."""
    return {"card": card, "target": target}


def publish_record_path(workspace: Workspace, target: str) -> Path:
    """Return where the record of a target stands."""
    return workspace.records / f"publish-{fingerprint(target)[:12]}.json"


def publish_record(
    stage_fingerprint: str, target: str, files: list[FileDigest], published: Published
) -> PublishRecord:
    """Return what is written down of a build that people see."""
    return PublishRecord(
        fingerprint=stage_fingerprint,
        outputs=files if is_folder(target) else [],
        target=target,
        revision=published.revision,
        url=published.url,
        contents=files,
        change=published.diff.describe(),
    )


def publishable_files(build: Build) -> list[FileDigest]:
    """Return the files of a build that may be published.

    Raises:
        PublishError: a record or a number is missing, a bound is broken, or the licence stands in
            the way.
        IntegrityError: the build on disk is not what was recorded.
    """
    require_license(build.checkpoint.source, build.recipe.publish, build.recipe.file)
    proofs = Proofs(
        AssembleStage(build).current(),
        CardStage(build).current(),
        ParityStage(build).current(),
        DivergenceStage(build).current(),
        EvaluationStage(build).current(),
    )
    return proven_files(build.workspace, build.recipe, proofs)


@dataclass(frozen=True)
class Proofs:
    """What was recorded of a build; None is what was not, or of another one."""

    assemble: BuildRecord | None
    card: CardRecord | None
    parity: ParityStageRecord | None
    divergence: DivergenceRecord | None
    evaluate: EvaluationRecord | None


def proven_files(workspace: Workspace, recipe: Recipe, proofs: Proofs) -> list[FileDigest]:
    """Return the files of a build that its records prove, whatever its licence.

    Raises:
        PublishError: a record or a number is missing, or a bound is broken.
        IntegrityError: the build on disk is not what was recorded.
    """
    _require_proof(workspace, recipe, proofs)
    assembled, card = proofs.assemble, proofs.card
    if assembled is None or card is None:
        missing = "assemble" if assembled is None else "card"
        raise PublishError(
            f"{workspace.root}: stage {missing!r} is not done, so there is nothing to "
            "publish. Run the flow again: it does what is left."
        )
    _verify_once(workspace.checkpoint)
    for file in card.outputs:
        file.check(workspace.checkpoint)
    return [*assembled.outputs, *card.outputs]


def _require_proof(workspace: Workspace, recipe: Recipe, proofs: Proofs) -> None:
    parity, divergence, evaluation = proofs.parity, proofs.divergence, proofs.evaluate
    if parity is None or divergence is None or evaluation is None:
        records = {"parity": parity, "divergence": divergence, "evaluate": evaluation}
        missing = next(stage for stage, record in records.items() if record is None)
        raise PublishError(
            f"{workspace.root}: stage {missing!r} has no passing record for this build, and "
            "nothing is published unproved. Run the flow again: it does what is left."
        )
    try:
        enforce(parity.found, workspace.checkpoint)
        check_divergence(divergence, recipe.divergence)
        check_bounds(evaluation, recipe.evaluation)
    except (ParityError, EvaluationError) as error:
        raise PublishError(f"a bound of the recipe is broken: {error}") from None
    perplexity = evaluation.measurements.perplexity
    numbers = {
        "parity: mean KL": parity.found.mean_kl,
        "parity: top-1 agreement": parity.found.top1_agreement,
        "parity: largest layer error": parity.found.max_layer_error,
        "divergence: mean KL": divergence.row().mean_kl.value,
        "evaluation: perplexity": max((text.value for text in perplexity), default=None),
    }
    for name, value in numbers.items():
        if value is None or not math.isfinite(value):
            raise PublishError(
                f"{workspace.root}: {name} is {value}: it was not measured. Let the recipe "
                "measure it (parity.layers: all, a perplexity text) and run the flow again."
            )


def _verify_once(folder: Path) -> None:
    """Verify a build, unless this process did and no file changed since."""
    manifest = load_manifest(folder)
    paths = [folder / file.path for file in (*(s.file for s in manifest.shards), *manifest.files)]
    state = tuple(
        (str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.exists()
    )
    if len(state) == len(paths) and state in _verified:
        return
    verify(folder)
    _verified.add(state)
