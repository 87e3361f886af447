"""In which order source shards are read, and what that costs in open outputs and disk.

Outputs are laid out in the order in which their sources are stored, and source shards are read in
that order. So the outputs that are begun and not full stay few: for GLM-5.2 three, since an expert
stack fills while the four or five shards of its layer pass. Any other order would leave more open.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glm_quant.checkpoint.source import SourceFile
from glm_quant.errors import RecipeError
from glm_quant.quantize.jobs import Job

# Far above what any sensible recipe needs, far below what one process may open.
MAX_OPEN_OUTPUTS = 64


@dataclass(frozen=True)
class Schedule:
    """What carrying out a plan takes.

    Attributes:
        source_shards: those that are read, in order.
        open_outputs: the most that are begun and not full at a time.
    """

    source_shards: tuple[str, ...]
    open_outputs: int

    @classmethod
    def of(cls, jobs: Sequence[Job], weight_map: Mapping[str, str]) -> "Schedule":
        """Go through the jobs as the engine does."""
        order = sorted({weight_map[job.source] for job in jobs})
        position = {name: i for i, name in enumerate(order)}
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for job in jobs:
            at = position[weight_map[job.source]]
            for shard in job.shards:
                first[shard] = min(first.get(shard, at), at)
                last[shard] = max(last.get(shard, at), at)
        opened = [0] * (len(order) + 1)
        for shard in first:
            opened[first[shard]] += 1
            opened[last[shard] + 1] -= 1
        now = most = 0
        for change in opened:
            now += change
            most = max(most, now)
        return cls(tuple(order), most)

    def check(self) -> None:
        """Refuse a plan that would keep too many outputs open.

        Raises:
            RecipeError: it would.
        """
        if self.open_outputs > MAX_OPEN_OUTPUTS:
            raise RecipeError(
                f"{self.open_outputs} output shards would be open at a time, at most "
                f"{MAX_OPEN_OUTPUTS} are: `shard_bytes` is too small for layers of this size. "
                "Raise it in the recipe."
            )

    def peak_disk_bytes(
        self, output_bytes: int, files: Mapping[str, SourceFile], window: int | None
    ) -> int:
        """Return the most that stands on disk at a time.

        Args:
            output_bytes: of the whole build.
            files: of the source, for their sizes.
            window: fetched source shards at a time; None for a source that is used where it is.
        """
        sizes = sorted(files[name].size_bytes for name in self.source_shards if name in files)
        return output_bytes + sum(sizes[-window:] if window else [])
