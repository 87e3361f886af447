"""Our side of the comparison: the runtime that lies in an output folder, run by stock mlx-lm.

The runtime under test is always the copy that travels with the build, never the one in this
package. It runs twice: on the source's own weights in float32 (*unquantized*: only the arithmetic
can differ from the reference) and on the build as it ships (*candidate*: quantized).
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

# mlx_lm is imported where it is used: it brings transformers, which costs seconds.
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import ParityError
from glm_quant.litter import entries
from glm_quant.model.runtime import load_runtime, read_config
from glm_quant.parity.measures import Array

# What transformers hardwires; a build may carry another value (vLLM and SGLang use 1e-5).
REFERENCE_LATENT_EPS = 1e-6


def reference_args(runtime: ModuleType, output: Path) -> Any:
    """Return the runtime's arguments from the build's config, with the reference's latent eps."""
    config = read_config(output) | {"latent_norm_eps": REFERENCE_LATENT_EPS}
    return runtime.ModelArgs.from_dict(config)


def load_unquantized(source: Path, output: Path) -> Any:
    """Build the runtime on the source's weights, in float32; for models that fit into memory.

    Raises:
        ParityError: The weights are not the ones that the runtime expects.
    """
    runtime = load_runtime(output)
    model = runtime.Model(reference_args(runtime, output))
    weights: dict[str, mx.array] = {}
    for shard in entries(source, "model*.safetensors"):
        weights.update(load_shard(shard))
    try:
        model.load_weights(list(model.sanitize(weights).items()), strict=True)
    except ValueError as error:
        raise ParityError(f"{source}: the runtime cannot take its weights: {error}") from None
    model.set_dtype(mx.float32)
    model.eval()
    return model


def load_candidate(output: Path) -> Any:
    """Load the build as a user does: stock mlx-lm, strictly, with the bundled runtime.

    Raises:
        ParityError: mlx-lm refuses it.
    """
    from mlx_lm.utils import load_model

    try:
        return runnable(load_model(output, trust_remote_code=True)[0])
    except ValueError as error:
        raise ParityError(f"{output}: stock mlx-lm cannot load the build: {error}") from None


def logits_of(model: Any, tokens: Array, chunks: Sequence[int] = ()) -> Array:
    """Return float32 logits, [positions, vocab_size].

    Args:
        model: A runtime's model.
        tokens: Token ids, [positions].
        chunks: Lengths of successive calls with a cache; empty for one call without.
    """
    ids = mx.array(np.asarray(tokens, np.int32))[None]
    if not chunks:
        return to_numpy(model(ids)[0])
    cache = model.make_cache()
    parts: list[Array] = []
    start = 0
    for length in chunks:
        parts.append(to_numpy(model(ids[:, start : start + length], cache=cache)[0]))
        start += length
    return np.concatenate(parts)


def to_numpy(array: mx.array) -> Array:
    """Return float32 values of an mlx array."""
    return np.array(array.astype(mx.float32))


def load_shard(path: Path) -> dict[str, mx.array]:
    """Return a shard's tensors, lazily: bytes are read when a value is computed."""
    return cast("dict[str, mx.array]", mx.load(str(path)))


class SourceLayers:
    """The runtime's layers on a source's weights in float32, one in memory at a time.

    Routed experts come in blocks of `_BLOCK_BYTES`.
    """

    def __init__(self, source: Checkpoint, output: Path) -> None:
        """Read configs; no weight yet."""
        self._source = source
        self._runtime = load_runtime(output)
        self.args = reference_args(self._runtime, output)
        self._model = _shell(self._runtime, self.args)

    def layer(self, index: int) -> Any:
        """Return a decoder layer of the runtime, loaded."""
        prefix = f"model.layers.{index}."
        names = [
            name
            for name in self._source.tensors
            if name.startswith(prefix) and ".mlp.experts." not in name
        ]
        weights = self._model.sanitize({name: self._source.read(name) for name in names})
        layer = self._runtime.DecoderLayer(self.args, index)
        if self.args.sparse_layers[index]:
            layer.mlp.switch_mlp = StreamedExperts(
                self._runtime, self.args, self._source, f"{prefix}mlp.experts"
            )
        return _load(layer, {name.removeprefix(prefix): w for name, w in weights.items()})

    def first_span(self) -> Any:
        """Return the span of a call without cache."""
        return self._runtime.Span.of(None)


class StreamedExperts(nn.Module):
    """A stand-in for `SwitchGLU` that loads the source's experts block by block."""

    def __init__(self, runtime: ModuleType, args: Any, source: Checkpoint, prefix: str) -> None:
        """Remember where the experts are."""
        super().__init__()
        self._make = runtime.SwitchGLU
        self._args = args
        self._source = source
        self._prefix = prefix
        each = 12 * args.moe_intermediate_size * args.hidden_size  # three float32 matrices
        self._count = max(min(_BLOCK_BYTES // each, args.n_routed_experts), 1)

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        """Return each chosen expert's output, [B, L, num_experts_per_tok, hidden_size]."""
        flat = x.reshape(-1, x.shape[-1])
        experts = np.array(chosen).reshape(len(flat), -1)
        out = np.zeros((*experts.shape, x.shape[-1]), np.float32)
        for first in range(0, self._args.n_routed_experts, self._count):
            count = min(self._count, self._args.n_routed_experts - first)
            token, slot = np.nonzero((experts >= first) & (experts < first + count))
            if token.size:
                local_experts = mx.array(experts[token, slot] - first)[:, None]
                out[token, slot] = to_numpy(
                    self._block(first, count)(flat[mx.array(token)], local_experts)
                )[:, 0]
        return mx.array(out).reshape(*chosen.shape, -1)

    def _block(self, first: int, count: int) -> Any:
        block = self._make(self._args.hidden_size, self._args.moe_intermediate_size, count)
        weights = {
            f"{name}.weight": mx.stack(
                [
                    self._source.read(f"{self._prefix}.{expert}.{name}.weight")
                    for expert in range(first, first + count)
                ]
            )
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        return _load(block, weights)


class BuildLayers:
    """The layers of a build as it ships, one in memory at a time."""

    def __init__(self, output: Path) -> None:
        """Read config and index; no weight yet."""
        self._folder = output
        self._runtime = load_runtime(output)
        self._config = read_config(output)
        self.args = self._runtime.ModelArgs.from_dict(self._config)
        self._weight_map = Checkpoint.open(output).index.weight_map

    def layer(self, index: int) -> Any:
        """Return a decoder layer, quantized as the config says."""
        prefix = f"model.layers.{index}."
        return self._quantized(self._runtime.DecoderLayer(self.args, index), prefix)

    def embed(self, tokens: Array) -> mx.array:
        """Return embeddings of token ids as the build computes them, [1, L, hidden_size]."""
        table = nn.Embedding(1, self.args.hidden_size)
        table.weight = mx.zeros((self.args.vocab_size, self.args.hidden_size))
        holder = self._quantized(_holder(embed_tokens=table), "model.")
        return holder.embed_tokens(mx.array(np.asarray(tokens, np.int32)))[None]

    def logits(self, hidden: mx.array) -> Array:
        """Return logits [L, vocab_size] of final hidden states [1, L, hidden_size]."""
        norm = _holder(norm=nn.RMSNorm(self.args.hidden_size, eps=self.args.rms_norm_eps))
        norm = self._quantized(norm, "model.")
        if self.args.tie_word_embeddings:
            table = nn.Embedding(1, self.args.hidden_size)
            table.weight = mx.zeros((self.args.vocab_size, self.args.hidden_size))
            head = self._quantized(_holder(embed_tokens=table), "model.").embed_tokens.as_linear
        else:
            linear = nn.Linear(self.args.hidden_size, self.args.vocab_size, bias=False)
            head = self._quantized(_holder(lm_head=linear), "").lm_head
        return to_numpy(head(norm.norm(hidden))[0])

    def first_span(self) -> Any:
        """Return the span of a call without cache."""
        return self._runtime.Span.of(None)

    def _quantized(self, module: Any, prefix: str) -> Any:
        """Give a module the schemes and the weights that the build has under `prefix`."""
        schemes = self._config.get("quantization") or {}

        def scheme(path: str, part: Any) -> Any:
            del part
            return schemes.get(prefix + path, False)

        nn.quantize(module, class_predicate=scheme)
        opened: dict[str, dict[str, mx.array]] = {}  # not kept: read tensors would stay in memory
        weights: dict[str, mx.array] = {}
        for name, _ in _flat(module):
            shard = self._weight_map.get(prefix + name)
            if shard is None:
                raise ParityError(
                    f"{self._folder}: the build has no tensor {prefix + name}, which its own "
                    "config implies. Convert again."
                )
            if shard not in opened:
                opened[shard] = load_shard(self._folder / shard)
            weights[name] = opened[shard][prefix + name]
        module.load_weights(list(weights.items()), strict=True)
        return runnable(module.eval())


_BLOCK_BYTES = 1 << 30


def runnable(model: Any) -> Any:
    """Cast unquantized experts to float32 on the CPU, whose GatherMM knows nothing else."""
    from mlx_lm.models.switch_layers import SwitchLinear

    if mx.default_device() == mx.Device(mx.DeviceType.cpu):
        for module in model.modules():
            if isinstance(module, SwitchLinear):
                module.weight = module.weight.astype(mx.float32)
    return model


def _flat(module: Any) -> list[tuple[str, mx.array]]:
    return cast("list[tuple[str, mx.array]]", tree_flatten(module.parameters()))


def _holder(**parts: nn.Module) -> Any:
    """Return a module that holds parts under the names that checkpoints give them."""
    holder = nn.Module()
    for name, part in parts.items():
        setattr(holder, name, part)
    return holder


def _shell(runtime: ModuleType, args: Any) -> Any:
    """Return a model object for its `sanitize` alone, without the parameters of any layer."""
    model = runtime.Model.__new__(runtime.Model)
    nn.Module.__init__(model)
    model.args = args
    return model


def _load(module: Any, weights: dict[str, mx.array]) -> Any:
    """Load weights strictly, as float32."""
    named = [(name, w.astype(mx.float32)) for name, w in weights.items()]
    try:
        module.load_weights(named, strict=True)
    except ValueError as error:
        raise ParityError(f"The runtime cannot take the source's weights: {error}") from None
    return module.eval()
