"""Publishing a finished build by what its workspace recorded: no recipe and no source is asked for.

The recipe is the manifest's, the licence that which the source stated, and the records are one
build's: whoever makes another one deletes those that speak of it (`Stage.keep`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from glm_quant.artifact import FileDigest
from glm_quant.checkpoint.manifest import MANIFEST_NAME, load_manifest
from glm_quant.errors import ApprovalError, CardError, CheckpointError, PublishError
from glm_quant.fingerprint import fingerprint
from glm_quant.hub import open_target
from glm_quant.hub.license import judge_license
from glm_quant.hub.target import SHARD_ENDING, Diff, Target, compare
from glm_quant.ownership import Owner
from glm_quant.quantize.convert import Watcher
from glm_quant.recipe import Recipe
from glm_quant.stages.approval import last_word
from glm_quant.stages.card import BuildRecords, CardRecord, CardStage, recipe_of
from glm_quant.stages.publish import (
    Proofs,
    PublishRecord,
    PublishStage,
    proven_files,
    publish_inputs,
    publish_record,
    publish_record_path,
)
from glm_quant.workspace import Workspace


@dataclass(frozen=True)
class RecordedBuild:
    """A finished build that may be published.

    Attributes:
        build_id: what it is called where it waits out of sight.
        card: the fingerprint of its card.
        files: all of it, every byte held against its digest.
    """

    workspace: Workspace
    recipe: Recipe
    build_id: str
    card: str
    files: list[FileDigest]

    @classmethod
    def open(cls, workspace: Workspace) -> Self:
        """Check all that must be true before a build goes out.

        Raises:
            PublishError: it is not finished or not proved, or the licence stands in the way.
            IntegrityError: it is not what was recorded.
        """
        recipe = _recipe(workspace)
        records = BuildRecords.read(workspace)
        _judge_license(workspace, records, recipe)
        card = CardRecord.load(workspace.records / f"{CardStage.name}.json")
        if card is not None and card.fingerprint != records.card_fingerprint(recipe):
            raise PublishError(
                f"{workspace.checkpoint}: its card was not made from the records that stand beside "
                f"it, or by another version. Say `glm-quant card {workspace.root}` first."
            )
        if records.assemble is not None:  # the manifest, and config.json
            records.inputs(workspace)
        proofs = Proofs(
            records.assemble, card, records.parity, records.divergence, records.evaluate
        )
        files = proven_files(workspace, recipe, proofs)
        if records.assemble is None or card is None:  # `proven_files` has refused that
            raise PublishError(f"{workspace.root}: there is no finished build.")
        return cls(workspace, recipe, records.assemble.fingerprint[:12], card.fingerprint, files)

    def target(self, uri: str) -> Target:
        """Return a target, as the recipe wants it.

        Raises:
            PublishError: there are no targets of this kind, or the address is malformed.
        """
        return open_target(uri, self.build_id, self.recipe.publish)

    def diff(self, uri: str) -> Diff:
        """Return what publishing would change at a target.

        Raises:
            PublishError: it cannot be reached.
        """
        return compare(self.workspace.checkpoint, self.files, self.target(uri).visible().files)

    def publish(self, uri: str, watcher: Watcher) -> PublishRecord:
        """Publish to a target, and record it as a run would.

        Raises:
            PublishError: the target refuses.
        """
        target, folder = self.target(uri), self.workspace.checkpoint
        watcher.begin(PublishStage.name)
        shards = [file for file in self.files if file.path.endswith(SHARD_ENDING)]
        for number, shard in enumerate(shards):
            target.upload(folder, shard)
            watcher.move(PublishStage.name, number + 1, len(shards) + 1)
        published = target.publish(folder, self.files)
        inputs = publish_inputs(self.card, uri)
        key = fingerprint({"stage": PublishStage.name, "inputs": inputs})
        record = publish_record(key, uri, self.files, published)
        record.save(publish_record_path(self.workspace, uri))
        return record


def publish_recorded(
    workspace: Workspace, targets: Sequence[str], watcher: Watcher
) -> list[PublishRecord]:
    """Publish a finished build to some targets; one that fails does not keep the others from it.

    Raises:
        BusyError: a run is working in the workspace.
        ApprovalError: it needs a person's word first.
        PublishError: it may not be published, or some targets failed; the others are done.
    """
    with workspace.locked():
        build = RecordedBuild.open(workspace)
        _require_approval(build)
        for uri in targets:  # a malformed one, before anything is sent
            build.target(uri)
        records: list[PublishRecord] = []
        failures: list[str] = []
        for uri in targets:
            try:
                records.append(build.publish(uri, watcher))
            except PublishError as error:
                failures.append(f"{uri}: {error}")
    if failures:
        raise PublishError(
            f"{len(failures)} of {len(targets)} targets failed, the others are done. The same "
            f"command again does what is left. {'; '.join(failures)}"
        )
    return records


def _recipe(workspace: Workspace) -> Recipe:
    try:
        recipe = recipe_of(load_manifest(workspace.checkpoint), workspace)
    except CheckpointError:
        raise PublishError(
            f"{workspace.root}: there is no finished build in it. Let the run finish first; "
            f"`glm-quant status {workspace.root}` shows what is left."
        ) from None
    except CardError as error:
        raise PublishError(str(error)) from None
    return recipe.model_copy(update={"file": str(workspace.checkpoint / MANIFEST_NAME)})


def _judge_license(workspace: Workspace, records: BuildRecords, recipe: Recipe) -> None:
    source = records.source
    if source is None or source.license is None:
        raise PublishError(
            f"{workspace.records / 'download.json'}: it does not say what licence the source "
            "states: nothing was run here, or only by an earlier version. Run the flow again: it "
            "does what is left."
        )
    judge_license(source.license, source.uri, recipe.publish, recipe.file)


def _require_approval(build: RecordedBuild) -> None:
    owner = Owner.load(build.workspace)
    asked = owner is not None and bool(owner.spec.get("approval"))
    word = last_word(build.workspace)
    if (asked or build.recipe.publish.approval) and not (word and word.approved):
        raise ApprovalError(
            f"{build.recipe.name}: publishing needs a person's word. Look at "
            f"{build.workspace.checkpoint}, say `glm-quant approve {build.workspace.root}`, and "
            "run the same command again."
        )
