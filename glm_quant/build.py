"""One build: which recipe, which source, which workspace, and the objects that follow from them.

`BuildSpec` is what a person or a deployment asks for. A `Build` is opened from it once, for a flow
or a command, and handed on: opening reads config, index and headers, and plans every output byte.
"""

import logging
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from glm_quant.calibration.build_calibration import converts_while_calibrating, standing_imatrix
from glm_quant.calibration.one_pass import source_bytes
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import RecipeError
from glm_quant.hub import DEFAULT_WINDOW, open_source, open_target
from glm_quant.hub.retry import Patience
from glm_quant.hub.target import Target
from glm_quant.ownership import (
    Owner,
    absolute_place,
    require_owner,
    source_identity,
    source_name,
)
from glm_quant.quantize.convert import Conversion
from glm_quant.quantize.plan import make_plan
from glm_quant.recipe import S3_PLACE, Recipe, RecordsSettings, load_recipe
from glm_quant.workspace import Workspace, existing_workspace

if TYPE_CHECKING:
    from glm_quant.hub.records import SharedRecords

_log = logging.getLogger(__name__)

DEFAULT_RESTARTS = 3


class BuildSpec(BaseModel):
    """What to build. Small and plain, so that it can be a Prefect parameter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str = Field(description="name of a shipped recipe, or path of a .yaml file")
    source: str | None = Field(
        default=None, description="folder or URI of the checkpoint; default: the recipe's source"
    )
    workspace: str | None = Field(
        default=None,
        description="folder in which the build is made; default: workspace/SOURCE-RECIPE",
    )
    output: str | None = Field(
        default=None, description="folder of the checkpoint; default: checkpoint/ in the workspace"
    )
    window: int = Field(
        default=DEFAULT_WINDOW, ge=1, description="fetched source shards on disk at a time"
    )
    reuse: tuple[str, ...] = Field(
        default=(), description="workspaces of other builds whose finished tensors may be copied"
    )
    targets: tuple[str, ...] = Field(
        default=(), description="where to publish, besides the recipe's own targets"
    )
    baselines: dict[str, str] = Field(
        default={},
        description="builds to compare with, by name, as the recipe's; places of this machine "
        "belong here, since the recipe travels with the build",
    )
    records: str | None = Field(
        default=None,
        pattern=S3_PLACE,
        description="s3://bucket/prefix, one for each build: its records are copied there, so that "
        "another machine can take it over; default: the recipe's",
    )
    replace: bool = Field(
        default=False,
        description="make it in the place of another recipe's or another source's build, if the "
        "workspace holds one; an edited recipe and a new commit need no such word",
    )
    approval: bool = Field(
        default=False, description="ask for a person's word before anything is published"
    )
    restarts: int = Field(
        default=DEFAULT_RESTARTS,
        ge=0,
        description="how often a crashed run may start again by itself, if its deployment is "
        "tagged auto-restart",
    )


class AssessSpec(BaseModel):
    """What to judge, against what. Small and plain, so that it can be a Prefect parameter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str = Field(description="folder of the finished build")
    recipe: str = Field(description="recipe whose bounds and settings hold: a name, or a .yaml")
    source: str | None = Field(
        default=None, description="what it was made from; default: the recipe's source"
    )
    workspace: str = Field(default="assess", description="folder for the records")
    window: int = Field(default=DEFAULT_WINDOW, ge=1, description="source shards on disk at a time")

    def build(self) -> BuildSpec:
        """Return the build whose output the checkpoint is."""
        return BuildSpec(
            recipe=self.recipe,
            source=self.source,
            workspace=self.workspace,
            output=self.checkpoint,
            window=self.window,
        )


class Build:
    """An opened build.

    Attributes:
        spec: what was asked for.
        recipe: its recipe.
        workspace: where it is made.
        checkpoint: the source.
        targets: where it is published, the recipe's first.
        baselines: builds to compare with, by name.
        plan: every output byte's place; another one once the recipe's calibration was made.
        conversion: the plan being carried out.
        shared_records: the records' copy in S3 and the lease on it, if this build has one.
    """

    def __init__(self, spec: BuildSpec, workers: int | None = None, publishes: bool = True) -> None:
        """Read the recipe and the source's metadata, and plan.

        Args:
            spec: which build.
            workers: threads that encode; default: one a core. The bytes do not depend on it.
            publishes: it has the targets of recipe and spec; else it has none.

        Raises:
            InputError: the recipe or the source is not what it should be.
        """
        self.spec = spec
        self.recipe = load_recipe(spec.recipe)
        source = _source_of(spec, self.recipe)
        self.workspace = workspace_of(spec)
        self.checkpoint = Checkpoint(open_source(source, self.workspace, spec.window))
        targets = (*self.recipe.publish.targets, *spec.targets) if publishes else ()
        self.targets = tuple(dict.fromkeys(targets))
        self.baselines = {**self.recipe.baselines, **spec.baselines}
        self.shared_records: SharedRecords | None = None
        self._workers = workers
        self.make_plan()
        for warning in self.plan.warnings:
            _log.warning("%s", warning)

    def make_plan(self) -> None:
        """Plan with the recipe's own calibration, if it is made.

        Whoever calibrates calls this again: which codes a weight gets is known only then.
        """
        imatrix = standing_imatrix(self.checkpoint, self.recipe, self.workspace)
        self.plan = make_plan(self.checkpoint, self.recipe, imatrix)
        self.conversion = Conversion(
            self.checkpoint,
            self.plan,
            self.workspace,
            self._workers,
            reuse=[existing_workspace(folder) for folder in self.spec.reuse],
            # Work ahead would fill the disk where shards leave it no faster than they are uploaded.
            ahead=not self.evicts_shards,
        )

    def close(self) -> None:
        """End whatever works ahead for this build; what was encoded is kept."""
        self.conversion.close()

    def require_held(self) -> None:
        """Check that no other machine has taken the build over.

        Raises:
            BusyError: one has.
        """
        if self.shared_records is not None:
            self.shared_records.require_held()

    @property
    def evicts_shards(self) -> bool:
        """Whether a finished shard leaves this disk once every target has it."""
        return bool(self.targets) and not self.recipe.publish.keep_local

    @property
    def shares_records(self) -> bool:
        """Whether the records are shared in S3, so that some may be another machine's."""
        return _records_settings(self.spec, self.recipe) is not None

    @property
    def converts_while_calibrating(self) -> bool:
        """Whether the pass that calibrates encodes the weights too."""
        return converts_while_calibrating(self.checkpoint, self.recipe, self.evicts_shards)

    @property
    def kept_source_bytes(self) -> int:
        """How much of the source stands on this disk while one pass calibrates and converts."""
        if not self.converts_while_calibrating:
            return 0
        return source_bytes(self.checkpoint, self.workspace)

    def require_space(self) -> None:
        """Check that the disk has room for what is left to write.

        Raises:
            DiskSpaceError: it has not.
            RecipeError: too many outputs would be open at a time.
        """
        self.conversion.check_space(self.evicts_shards, self.kept_source_bytes)

    def open_target(self, uri: str, build_id: str, patience: Patience | None = None) -> Target:
        """Return one of the build's targets, as the recipe wants it.

        Raises:
            PublishError: there are no targets of this kind.
        """
        return open_target(uri, build_id, self.recipe.publish, patience)


def workspace_of(spec: BuildSpec) -> Workspace:
    """Return the paths of a build, without opening it."""
    output = Path(spec.output).expanduser().absolute() if spec.output else None
    folder = Path(spec.workspace).expanduser() if spec.workspace else _default_workspace(spec)
    return Workspace(folder.absolute(), output)


def _default_workspace(spec: BuildSpec) -> Path:
    recipe = load_recipe(spec.recipe)
    return Path("workspace") / f"{source_name(_source_of(spec, recipe))}-{recipe.name}"


def _source_of(spec: BuildSpec, recipe: Recipe) -> str:
    source = spec.source or recipe.source
    if source is None:
        raise RecipeError(f"{recipe.file}: the recipe names no source. Give one with --source.")
    return source


def _take_workspace(spec: BuildSpec, keep: bool) -> None:
    """Refuse a workspace that is another build's; if wanted, write down that it is this one's."""
    recipe, workspace = load_recipe(spec.recipe), workspace_of(spec)
    source = _source_of(spec, recipe)
    owner = Owner(
        recipe=recipe.name,
        source=source_identity(source),
        spec=_absolute(spec, source, workspace).model_dump(mode="json"),
    )
    require_owner(workspace, owner, source, spec.replace)
    if keep:
        owner.save(workspace)


def _absolute(spec: BuildSpec, source: str, workspace: Workspace) -> BuildSpec:
    """Return a spec that means the same in any folder, and replaces nothing."""
    recipe = Path(spec.recipe).expanduser()
    return spec.model_copy(
        update={
            "recipe": str(recipe.absolute()) if recipe.is_file() else spec.recipe,
            "source": absolute_place(source),
            "workspace": str(workspace.root),
            "output": str(workspace.output) if workspace.output else None,
            "reuse": tuple(map(absolute_place, spec.reuse)),
            "targets": tuple(map(absolute_place, spec.targets)),
            "baselines": {name: absolute_place(at) for name, at in spec.baselines.items()},
            "replace": False,
        }
    )


@contextmanager
def claimed(spec: BuildSpec, shared: bool = False) -> Generator["SharedRecords | None"]:
    """Hold a build's workspace for as long as the block runs; then the build is finished.

    Args:
        spec: which build.
        shared: its records are those in S3, if the spec or the recipe wants them there.

    Returns:
        The records in S3, if there are any.

    Raises:
        OutputError: the workspace holds something else, or another build.
        BusyError: another process works in it, or another machine on the build.
        PublishError: the records in S3 cannot be reached.
    """
    workspace = workspace_of(spec)
    workspace.create()
    with workspace.locked(), _records_in_s3(spec) if shared else nullcontext() as shared_records:
        if shared:
            _take_workspace(spec, keep=True)
        yield shared_records
        workspace.pin.unlink(missing_ok=True)


def _records_settings(spec: BuildSpec, recipe: Recipe) -> RecordsSettings | None:
    """Return where a build's records are shared, if they are; the spec's place wins."""
    if spec.records is None:
        return recipe.records
    settings = recipe.records or RecordsSettings(uri=spec.records)
    return settings.model_copy(update={"uri": spec.records})


@contextmanager
def _records_in_s3(spec: BuildSpec) -> Generator["SharedRecords | None"]:
    """Keep the workspace's records at the place in S3 that is wanted, if one is."""
    settings = _records_settings(spec, load_recipe(spec.recipe))
    if settings is None:
        yield None
        return
    from glm_quant.hub.records import SharedRecords  # boto3 only where it is wanted

    with SharedRecords(settings.uri, workspace_of(spec), settings.lease_seconds) as shared_records:
        yield shared_records


def require_free(spec: BuildSpec) -> None:
    """Check that a build can be claimed, and fetch what another machine recorded of it.

    Raises:
        RecipeError: there is no such recipe.
        OutputError: the workspace holds something else.
        BusyError: another process works in it, or another machine on the build.
        PublishError: the records in S3 cannot be reached.
    """
    load_recipe(spec.recipe)  # before there is a folder
    workspace = workspace_of(spec)
    workspace.create()
    with workspace.locked(), _records_in_s3(spec):
        _take_workspace(spec, keep=False)
