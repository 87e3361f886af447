"""What no weight of a release is: all zero, or a copy of another weight.

Both are what a broken download, a wrong merge or a half-written shard looks like, and both quantize
without complaint. Only matrices are judged: fresh norms are all ones and a bias may be zero. Models
that were pruned, upcycled or never trained have such weights by right; their recipes `allow` them.
"""

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from hashlib import sha256

from glm_quant.checkpoint.header import TensorInfo
from glm_quant.errors import WeightError
from glm_quant.fingerprint import fingerprint
from glm_quant.recipe import Defect

_log = logging.getLogger(__name__)


class SourceCheck:
    """Checks source tensors as their blocks are read, against each other and for zeros."""

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        blocks: Mapping[str, int],
        allow: Collection[Defect] = (),
    ) -> None:
        """Begin with nothing read.

        Args:
            tensors: of the source.
            blocks: in how many blocks each one is read.
            allow: what the recipe lets pass, with a warning.
        """
        self._allow = allow
        self._counts = Counter[Defect]()
        self._tensors = tensors
        self._blocks = blocks
        self._read: dict[str, dict[int, str]] = {}
        self._all_zero: set[str] = set()
        self._by_content: dict[str, str] = {}
        self._zeros: dict[int, str] = {}

    def add_block(self, source: str, begin_row: int, digest: str, all_zero: bool) -> None:
        """Add one block of a tensor.

        Raises:
            WeightError: the tensor is whole now, and all zero or the same as another.
        """
        blocks = self._read.setdefault(source, {})
        if not blocks:
            # Zero until one of its blocks is not.
            self._all_zero.add(source)
        if not all_zero:
            self._all_zero.discard(source)
        blocks[begin_row] = digest
        if len(blocks) == self._blocks[source]:
            # What is whole needs its blocks no more; a release has very many.
            del self._read[source]
            digests = [blocks[row] for row in sorted(blocks)]
            self.add_tensor(source, digests, source in self._all_zero)

    def add_tensor(self, source: str, digests: list[str], all_zero: bool) -> None:
        """Add a whole tensor by the digests of its blocks.

        Raises:
            WeightError: it is all zero, or the same as another.
        """
        info = self._tensors[source]
        if len(info.shape) < 2:
            return
        if all_zero:
            self._report(
                "zero_weights",
                f"{info.shard}: tensor {source} {list(info.shape)} is all zero",
                "Fetch the shard again",
            )
            return
        # The shape belongs to it: a prefix of a larger tensor in equal blocks is no copy.
        content = fingerprint([info.shape, info.dtype, *digests])
        twin = self._by_content.setdefault(content, source)
        if twin != source:
            self._report(
                "equal_weights",
                f"{info.shard}: tensor {source} has the same bytes as {twin} in "
                f"{self._tensors[twin].shard}",
                "Weights of a release are never equal: fetch both shards again",
            )

    def _report(self, defect: Defect, message: str, remedy: str) -> None:
        """Stop at a defect, or warn of the first one where the recipe allows it.

        Raises:
            WeightError: the recipe does not allow it.
        """
        if defect not in self._allow:
            raise WeightError(
                f"{message}. {remedy}; if they stay so, the release is broken, or the model is "
                f"meant to be so (pruned, upcycled, never trained): then write `allow: [{defect}]` "
                "in the recipe."
            )
        self._counts[defect] += 1
        # A pruned model may have thousands.
        if self._counts[defect] == 1:
            _log.warning("%s; the recipe allows it. Further ones are not named.", message)

    def is_of_zeros(self, digest: str, size: int) -> bool:
        """Whether a digest is that of so many zero bytes.

        That of an FP8 block never is, since it covers the scales too: one that was read in an
        earlier run counts as not zero.
        """
        if size not in self._zeros:
            zeros = sha256()
            block = bytes(1 << 20)
            for _ in range(size >> 20):
                zeros.update(block)
            zeros.update(block[: size & ((1 << 20) - 1)])
            self._zeros[size] = zeros.hexdigest()
        return digest == self._zeros[size]
