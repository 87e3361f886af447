"""A person's word on a build: a record like any other, so whoever asks twice asks for nothing."""

from glm_quant.artifact import Record, sha256_file
from glm_quant.build import Build
from glm_quant.checkpoint.manifest import MANIFEST_NAME
from glm_quant.errors import ApprovalError, InputError
from glm_quant.fingerprint import fingerprint
from glm_quant.stages.publish import PublishStage
from glm_quant.workspace import Workspace

APPROVAL_NAME = "approval.json"


class ApprovalRecord(Record):
    """What a person said.

    Attributes:
        approved: whether it may be published.
        note: what they said besides.
        asked: how often anybody was asked about these bytes.
    """

    approved: bool
    note: str = ""
    asked: int = 1


def needs_approval(build: Build) -> bool:
    """Whether the recipe or the run asks for a word that nobody gave yet."""
    wanted = build.spec.approval or build.recipe.publish.approval
    if not wanted or not build.targets:
        return False
    said = last_word(build.workspace)
    return said is None or not said.approved


def last_word(workspace: Workspace) -> ApprovalRecord | None:
    """Return what was said about the bytes that stand in a workspace now."""
    record = ApprovalRecord.load(workspace.records / APPROVAL_NAME)
    return record if record and record.fingerprint == identity(workspace) else None


def give_word(
    workspace: Workspace, approved: bool, note: str, asked: int | None = None
) -> ApprovalRecord:
    """Record a person's word on the bytes that stand in a workspace now.

    Args:
        workspace: of the build.
        approved: whether it may be published.
        note: what the person said besides.
        asked: how often anybody was asked by now; default: once more than before.

    Raises:
        InputError: there is no finished build.
    """
    before = last_word(workspace)
    record = ApprovalRecord(
        fingerprint=identity(workspace),
        approved=approved,
        note=note,
        asked=asked or (before.asked if before else 0) + 1,
    )
    record.save(workspace.records / APPROVAL_NAME)
    return record


def refused(build: Build, note: str) -> ApprovalError:
    """Return the error of a build that a person did not want published."""
    said = f': "{note}"' if note else "."
    return ApprovalError(
        f"{build.recipe.name}: a person said no to publishing{said} The build stays in "
        f"{build.workspace.checkpoint}. Run again to be asked again."
    )


def question(build: Build) -> str:
    """Return in Markdown what would change where, for the person who decides.

    Raises:
        PublishError: it may not be published, or a target cannot be reached.
        IntegrityError: the build is not what was recorded.
    """
    changes = [(target, PublishStage(build, target).diff()) for target in build.targets]
    lines = [
        f"## May **{build.recipe.name}** be published?",
        f"Made from `{build.checkpoint.source.uri}`.",
        "",
        "| target | what would change there |",
        "|---|---|",
        *(f"| `{target}` | {diff.describe()} |" for target, diff in changes),
        "",
        "The evidence is beside this: `parity`, `divergence`, `evaluation` and `card`.",
    ]
    return "\n".join(lines)


def identity(workspace: Workspace) -> str:
    """Return the fingerprint of the bytes that stand in a workspace now.

    Raises:
        InputError: there is no finished build.
    """
    path = workspace.checkpoint / MANIFEST_NAME
    if not path.is_file():
        raise InputError(
            f"{path}: there is no manifest, so there is no finished build to speak about. Let the "
            "run finish first."
        )
    return fingerprint({"approval of": sha256_file(path)})
