"""Weights of a source or of a build, as float32, in pieces that fit any machine.

A layer comes as the runtime's own module without its routed experts; those come one at a time, read
ahead from disk or network. Quantized weights are expanded to the float32 values that they stand
for, so that source and build run through the same code and differ in nothing but their weights.
Expanding is exact only with float32 scales; in bfloat16, as
`mx.dequantize` does it by itself, each weight would be rounded once more.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from glm_quant.checkpoint.header import TensorInfo
from glm_quant.checkpoint.reader import Checkpoint, as_array
from glm_quant.errors import CheckpointError, MissingTensorError
from glm_quant.model.runtime import load_runtime
from glm_quant.streaming.products import with_products

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

# Experts that are read while one is computed: hides a disk's latency, and most of a network's.
AHEAD = 3
# Rows of embeddings that are read at a time: 400 MB as float32 at GLM-5.2's dims.
_TABLE_ROWS = 16384

Floats = NDArray[np.float32]


class Weights(ABC):
    """A model's weights by MLX names."""

    def __init__(self, checkpoint: Checkpoint, runtime: ModuleType) -> None:
        """Read the config; no weight yet."""
        self.checkpoint = checkpoint
        self.runtime = runtime
        self.args: Any = runtime.ModelArgs.from_dict(checkpoint.config)

    @abstractmethod
    def scheme(self, path: str) -> dict[str, Any] | None:
        """Return how the module at a path is quantized, None where it is not."""

    @abstractmethod
    def expert_parts(self, layer: int, expert: int, projection: str) -> dict[str, TensorInfo]:
        """Return where the parts of one matrix of an expert lie, by leaf (weight, scales ...)."""

    @abstractmethod
    def values(self, prefix: str, names: Sequence[str]) -> Mapping[str, mx.array]:
        """Return the float32 parameters under `prefix`, by the names after it."""

    def layer(self, index: int) -> Any:
        """Return a decoder layer of the runtime, loaded, without routed experts.

        Raises:
            CheckpointError: the weights are not what the runtime expects.
        """
        layer = self.runtime.DecoderLayer(self.args, index)
        if self.args.sparse_layers[index]:
            layer.mlp.pop("switch_mlp")
        return self._load(layer, f"model.layers.{index}.")

    def norm(self) -> Any:
        """Return the norm after the last layer."""
        norm = nn.RMSNorm(self.args.hidden_size, eps=self.args.rms_norm_eps)
        return self._load(norm, "model.norm.")

    def embed(self, tokens: NDArray[np.int64]) -> Floats:
        """Return embeddings of token ids, [L, hidden_size]."""
        out = np.empty((len(tokens), self.args.hidden_size), np.float32)
        for first in range(0, self.args.vocab_size, _TABLE_ROWS):
            count = min(_TABLE_ROWS, self.args.vocab_size - first)
            positions = np.flatnonzero((tokens >= first) & (tokens < first + count))
            if positions.size:
                table = self.rows("model.embed_tokens", first, count)
                out[positions] = np.array(table[mx.array(tokens[positions] - first)])
        return out

    def head(self, first: int, count: int) -> mx.array:
        """Return rows of the output head, [count, hidden_size]: one a token of the vocabulary."""
        path = "model.embed_tokens" if self.args.tie_word_embeddings else "lm_head"
        return self.rows(path, first, count)

    def rows(self, path: str, first: int, count: int) -> mx.array:
        """Return rows of a matrix."""
        parts = {leaf: info.rows(first, count) for leaf, info in self.parts(path).items()}
        return self._expand(path, {k: self.checkpoint.read_at(i) for k, i in parts.items()})

    def parts(self, path: str) -> dict[str, TensorInfo]:
        """Return where the parts of a matrix lie, by leaf.

        Raises:
            MissingTensorError: the checkpoint has no such matrix.
        """
        tensors = self.checkpoint.tensors
        if f"{path}.weight" not in tensors:
            raise MissingTensorError(
                f"{self.checkpoint.source.uri}: there is no tensor {path}.weight, although "
                "config.json implies it. Fetch or convert the checkpoint again."
            )
        leaves = ("weight", "scales", "biases") if self.scheme(path) else ("weight",)
        return {leaf: tensors[f"{path}.{leaf}"] for leaf in leaves if f"{path}.{leaf}" in tensors}

    def experts(self, layer: int, numbers: Sequence[int]) -> Iterator[tuple[int, list[mx.array]]]:
        """Yield (expert, [gate, up, down]) in the order of `numbers`; each [out, in]."""
        path = f"model.layers.{layer}.mlp.switch_mlp"
        with ThreadPoolExecutor(AHEAD, thread_name_prefix="expert") as pool:
            ahead: deque[Future[list[_Fetched]]] = deque()
            started = 0
            try:
                for expert in numbers:
                    while started < len(numbers) and len(ahead) < AHEAD:
                        ahead.append(pool.submit(self._fetch, layer, numbers[started]))
                        started += 1
                    fetched = ahead.popleft().result()
                    yield (
                        expert,
                        [
                            self._expand(
                                f"{path}.{name}",
                                {leaf: _decode(info, data) for leaf, info, data in parts},
                            )
                            for name, parts in zip(PROJECTIONS, fetched, strict=True)
                        ],
                    )
            finally:
                for future in ahead:
                    future.cancel()

    def _fetch(self, layer: int, expert: int) -> list["_Fetched"]:
        """Read an expert's bytes; in a thread, where mlx has no business."""
        read = self.checkpoint.source.read
        return [
            [
                (leaf, info, read(info.shard, info.begin, info.end))
                for leaf, info in self.expert_parts(layer, expert, name).items()
            ]
            for name in PROJECTIONS
        ]

    def _expand(self, path: str, parts: Mapping[str, mx.array]) -> mx.array:
        scheme = self.scheme(path)
        if scheme is None:
            return parts["weight"].astype(mx.float32)
        scales, biases = parts["scales"], parts.get("biases")
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(parts["weight"], scales, biases, **scheme).astype(mx.float32)

    def _load(self, module: Any, prefix: str) -> Any:
        flat = cast("list[tuple[str, mx.array]]", tree_flatten(module.parameters()))
        weights = self.values(prefix, [name for name, _ in flat])
        try:
            module.load_weights(list(weights.items()), strict=True)
        except ValueError as error:
            raise CheckpointError(
                f"{self.checkpoint.source.uri}: the runtime cannot take the weights of {prefix}* "
                f"({error}). Config and weights are of different models; fetch or convert again."
            ) from None
        return with_products(module.eval())


_Fetched = list[tuple[str, TensorInfo, bytes]]


def own_runtime() -> ModuleType:
    """Return this package's runtime; imported here, since mlx-lm brings seconds of transformers."""
    from glm_quant.model import glm_moe_dsa

    return glm_moe_dsa


class SourceWeights(Weights):
    """The source's weights, under this package's own runtime."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read the config; no weight yet."""
        runtime = own_runtime()
        super().__init__(checkpoint, runtime)
        # For its `sanitize` alone: no layer's parameters are made.
        self._shell: Any = runtime.Model.__new__(runtime.Model)
        nn.Module.__init__(self._shell)
        self._shell.args = self.args

    def scheme(self, path: str) -> dict[str, Any] | None:
        """Return None: a source is not quantized."""
        del path

    def expert_parts(self, layer: int, expert: int, projection: str) -> dict[str, TensorInfo]:
        """Return where one matrix of an expert lies."""
        name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
        return {"weight": self.checkpoint.tensors[name]}

    def values(self, prefix: str, names: Sequence[str]) -> Mapping[str, mx.array]:
        """Return parameters as the runtime makes them from the release's tensors."""
        del names
        stored = {
            name: self.checkpoint.read(name)
            for name in self.checkpoint.tensors
            if name.startswith(prefix) and ".mlp.experts." not in name
        }
        parameters: dict[str, mx.array] = self._shell.sanitize(stored)
        return {name.removeprefix(prefix): w.astype(mx.float32) for name, w in parameters.items()}


class BuildWeights(Weights):
    """A build's weights, under the runtime that travels in it."""

    def __init__(self, build: Path | Checkpoint) -> None:
        """Read config, index and headers; no weight yet.

        Args:
            build: its folder; or one that is being made, which has this package's own runtime.

        Raises:
            CheckpointError: the folder holds no build, or one without its runtime.
        """
        if isinstance(build, Checkpoint):
            super().__init__(build, own_runtime())
        else:
            checkpoint = Checkpoint.open(build)
            # Other people's builds of GLM come without one, since stock mlx-lm has its own.
            travels = "model_file" in checkpoint.config
            super().__init__(checkpoint, load_runtime(build) if travels else own_runtime())
        checkpoint = self.checkpoint
        self._schemes: dict[str, Any] = checkpoint.config.get("quantization") or {}

    def scheme(self, path: str) -> dict[str, Any] | None:
        """Return the scheme by mlx-lm's rule: a path's own, or the general one if it has scales."""
        if f"{path}.scales" not in self.checkpoint.tensors:
            return None
        module_scheme = self._schemes.get(path)
        chosen = module_scheme if isinstance(module_scheme, dict) else self._schemes
        return {key: chosen[key] for key in ("group_size", "bits", "mode") if key in chosen}

    def expert_parts(self, layer: int, expert: int, projection: str) -> dict[str, TensorInfo]:
        """Return where one matrix of an expert lies within the stacked tensors."""
        stacked = self.parts(f"model.layers.{layer}.mlp.switch_mlp.{projection}")
        return {leaf: info.rows(expert, 1) for leaf, info in stacked.items()}

    def values(self, prefix: str, names: Sequence[str]) -> Mapping[str, mx.array]:
        """Return the parameters, expanded."""
        parameters: dict[str, mx.array] = {}
        for name in names:
            path, _, leaf = f"{prefix}{name}".rpartition(".")
            if leaf == "weight":
                parts = {k: self.checkpoint.read_at(i) for k, i in self.parts(path).items()}
                parameters[name] = self._expand(path, parts)
            else:
                parameters[name] = self.checkpoint.read(f"{path}.{leaf}").astype(mx.float32)
        return parameters


def _decode(info: TensorInfo, data: bytes) -> mx.array:
    """Return stored bytes as an array; the stacked experts' first axis of one goes."""
    array = as_array(memoryview(data), info.dtype, info.shape)
    return array[0] if array.ndim == 3 else array
