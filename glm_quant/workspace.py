"""The folder in which one build is made, and the lock that keeps two runs apart.

WORKSPACE/
├── checkpoint/   the build: weights, config, tokenizer, runtime, manifest, card
├── source/       the few source shards that were fetched and are not used up yet
├── scratch/      what a stage fetched for a while; may be deleted at any time
├── partial/      output shards being filled, with their journals
├── previous/     finished shards of an earlier plan, while tensors are copied from them
├── records/      what each stage saw, made and measured
├── calibration/  importance of each weight's inputs (imatrix), if the recipe wants it
├── divergence/   final hidden states of the source, and each position's numbers
├── baselines/    the build that `demo` compares with
├── results/      Prefect's cached task results
├── published/    where `demo` publishes to
└── .lock         held (flock) by the run that is working here
"""

import fcntl
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from glm_quant.errors import BusyError, InputError, OutputError
from glm_quant.litter import entries

# What an output shard of any plan is called.
SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")

_OURS = {
    "checkpoint",
    "source",
    "scratch",
    "partial",
    "previous",
    "records",
    "calibration",
    "divergence",
    "baselines",
    "results",
    "published",
    ".lock",
}


def workspace_beside(output: Path) -> "Workspace":
    """Return the workspace of a conversion into a folder."""
    output = output.expanduser().absolute()
    return Workspace(output.with_name(f".{output.name}.glm-quant"), output)


def existing_workspace(folder: str) -> "Workspace":
    """Return the workspace that a folder is, or whose checkpoint it is.

    Raises:
        InputError: it is neither.
    """
    path = Path(folder).expanduser().absolute()
    places = [Workspace(path), workspace_beside(path)]
    if path == Workspace(path.parent).checkpoint:
        places.append(Workspace(path.parent))
    for workspace in places:
        if workspace.shard_records.is_dir():
            return workspace
    raise InputError(
        f"{folder}: nothing was converted here or into it. Give the --workspace of a run or the "
        "--output of a conversion."
    )


@dataclass(frozen=True)
class Workspace:
    """Paths of one build. `output` puts the checkpoint somewhere else than inside the workspace."""

    root: Path
    output: Path | None = None

    @property
    def checkpoint(self) -> Path:
        """The build: weights, config, tokenizer, runtime, manifest, card."""
        return self.output or self.root / "checkpoint"

    @property
    def source(self) -> Path:
        """Source shards that were fetched; whatever is in it may be deleted at any time."""
        return self.root / "source"

    @property
    def scratch(self) -> Path:
        """What a stage fetched for a while; whatever is in it may be deleted at any time."""
        return self.root / "scratch"

    @property
    def partial(self) -> Path:
        """Output shards that are not finished."""
        return self.root / "partial"

    @property
    def results(self) -> Path:
        """Prefect's task results, one JSON file each; whatever is in it may be deleted."""
        return self.root / "results"

    @property
    def divergence(self) -> Path:
        """The source's final hidden states and what builds were found to be beside it."""
        return self.root / "divergence"

    @property
    def baselines(self) -> Path:
        """Builds to compare with that were made for it."""
        return self.root / "baselines"

    @property
    def calibration(self) -> Path:
        """What `search` and `gptq` know of the inputs that each weight meets."""
        return self.root / "calibration"

    @property
    def previous(self) -> Path:
        """Finished shards of an earlier plan, with their records, while they are of use."""
        return self.root / "previous"

    @property
    def shard_records(self) -> Path:
        """One JSON file an output shard."""
        return self.records / "shards"

    @property
    def records(self) -> Path:
        """One JSON file a stage."""
        return self.root / "records"

    @property
    def pin(self) -> Path:
        """Which commit of a branch this build was begun with; gone when it is finished."""
        return self.records / "revision.json"

    def create(self) -> None:
        """Make the folder, refusing one that holds something else.

        The lock file is the mark of a workspace: a folder named `checkpoint` alone is none, many a
        training run has one. In a workspace that was worked in, other files are nobody's business,
        unless they lie among the shards and would be loaded with them.

        Raises:
            OutputError: the folder has files that no run of ours makes, or the checkpoint in it a
                shard that is no plan's.
        """
        if self.root.exists() and not self.root.is_dir():
            raise OutputError(f"{self.root}: this is a file. Choose a folder with --workspace.")
        self.root.mkdir(parents=True, exist_ok=True)
        lock = self.root / ".lock"
        known = _OURS if lock.exists() else set[str]()
        strangers = [path.name for path in entries(self.root) if path.name not in known]
        if strangers and not (lock.exists() and self.records.is_dir()):
            raise OutputError(
                f"{self.root}: the workspace holds something else ({', '.join(strangers[:3])}). "
                "Choose an empty folder with --workspace."
            )
        self._refuse_foreign_shards()
        lock.touch()

    def _refuse_foreign_shards(self) -> None:
        for path in entries(self.checkpoint, "*.safetensors"):
            if not SHARD_NAME.fullmatch(path.name):
                raise OutputError(
                    f"{path}: it is no shard of a build, and loaders would read it with the "
                    "build's. Move it elsewhere."
                )

    @contextmanager
    def locked(self) -> Generator[None]:
        """Hold the workspace; the kernel frees the lock when the process ends, however it ends.

        Raises:
            BusyError: another process holds it.
        """
        path = self.root / ".lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = path.read_text().strip() or "unknown"
                raise BusyError(
                    f"{self.root}: process {holder} is already working here. "
                    "Wait for it, stop it, or choose another --workspace."
                ) from None
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            yield
        finally:
            os.close(descriptor)
