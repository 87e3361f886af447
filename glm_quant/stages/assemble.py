"""The files around the weights, manifest last: the build is whole."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from glm_quant import __version__
from glm_quant.artifact import FileDigest, Record
from glm_quant.checkpoint.manifest import MANIFEST_NAME
from glm_quant.fingerprint import Canonical
from glm_quant.quantize.assemble import COMPANIONS, RUNTIME_NAME, assemble
from glm_quant.quantize.convert import Progress
from glm_quant.stages.base import PROOFS, Stage


class BuildRecord(Record):
    """A whole build: its outputs are every file of the checkpoint but the card.

    Attributes:
        machine: where it was assembled: system, architecture, cores. The manifest has no machine
            and no time, so that it is the same wherever and whenever it is made.
        finished_at: when, in UTC.
    """

    weights_fingerprint: str
    manifest_sha256: str
    versions: dict[str, str]
    size_bytes: int
    machine: str
    finished_at: str


class AssembleStage(Stage[BuildRecord]):
    """Config, index, tokenizer, runtime and manifest around finished shards."""

    name = "assemble"
    record_type = BuildRecord
    decides = PROOFS

    @property
    def root(self) -> Path:
        """The checkpoint folder."""
        return self.build.workspace.checkpoint

    def inputs(self) -> Canonical:
        """Return the shards' fingerprints, the files that come along, the runtime, the recipe."""
        build, outputs = self.build, self.build.conversion.outputs
        return {
            "shards": [outputs.fingerprint(shard) for shard in range(len(build.plan.shards))],
            "companions": {
                name: build.checkpoint.files[name].identity
                for name in ("config.json", *COMPANIONS)
                if name in build.checkpoint.files
            },
            "runtime": files("glm_quant.model").joinpath(RUNTIME_NAME).read_text(encoding="utf-8"),
            "recipe": build.recipe.model_dump_json(),
            "versions": [__version__, version("mlx")],
        }

    def is_whole(self, record: BuildRecord) -> bool:
        """Whether every file is here; shards may be kept elsewhere."""
        return all(map(self.build.conversion.outputs.is_kept, record.outputs))

    def make(self, progress: Progress) -> BuildRecord:
        """Write everything that is not weights, manifest last."""
        build = self.build
        folder = build.workspace.checkpoint
        manifest = assemble(build.conversion, build.checkpoint, build.recipe, folder)
        build.conversion.clean()
        progress(1, 1)
        account = FileDigest.of(folder, MANIFEST_NAME)
        outputs = [*(shard.file for shard in manifest.shards), *manifest.files, account]
        return BuildRecord(
            fingerprint=self.fingerprint(),
            outputs=outputs,
            weights_fingerprint=manifest.fingerprint,
            manifest_sha256=account.sha256,
            versions=manifest.versions,
            size_bytes=sum(output.size_bytes for output in outputs),
            machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def summarize(self, record: BuildRecord) -> str:
        """Return number and size of files."""
        return (
            f"{len(record.outputs)} files, {record.size_bytes / 1e9:,.3f} GB, "
            f"manifest sha256 {record.manifest_sha256[:12]}"
        )
