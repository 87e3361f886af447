"""The parity stage: settings in, a record or an error out."""

import logging
from collections.abc import Callable
from importlib.metadata import version
from math import prod
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.checkpoint.spool import local_folder, spooled
from glm_quant.data import held_out_text
from glm_quant.errors import ParityError
from glm_quant.memory import available_bytes
from glm_quant.model.precision import require_float32
from glm_quant.parity.limits import compared_layers, require_long_prompt
from glm_quant.parity.measures import Array, kl_divergence, top1_agreement
from glm_quant.parity.reference import require_reference
from glm_quant.parity.stream import LayerParity, Streamed, stream
from glm_quant.parity.whole import LogitParity, whole_logits
from glm_quant.recipe import ParitySettings
from glm_quant.settings import Bound

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

_FLOAT = 4


class ParityRecord(BaseModel):
    """What was compared, how, and what came out.

    Attributes:
        versions: Of mlx, mlx-lm, torch and transformers.
        tokens: Length of the prompt.
        prompt: "text", "built-in text" or "seeded"; see `prompt_kind`.
        index_topk: Keys that a query attends to; the prompt is longer.
        layers: One row per compared layer.
        max_layer_error: The largest attention or MLP error of the table.
        ties: Rows of the table's layers whose keys or experts differed by a tie.
        logits: Whole-model logits; None for models that are only streamed.
        mean_kl: Mean KL(reference ‖ build) over positions, in nats; None when the pass ended
            before the last layer.
        max_kl: Its largest value.
        top1_agreement: Share of positions with the same most likely token.
        settings: The recipe's: prompt and bounds.
    """

    model_config = ConfigDict(frozen=True)

    versions: dict[str, str]
    tokens: int
    prompt: str
    index_topk: int
    layers: list[LayerParity]
    max_layer_error: float
    ties: int
    logits: LogitParity | None
    mean_kl: float | None
    max_kl: float | None
    top1_agreement: float | None
    settings: ParitySettings


def check_parity(
    checkpoint: Checkpoint,
    output: Path,
    settings: ParitySettings,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> ParityRecord:
    """Compare a build, and its runtime on the source's weights, with the reference.

    The process keeps much of the memory that this takes: see `glm_quant.child_process`.

    Args:
        checkpoint: What the build was made from. From the Hub or S3 a layer at a time is fetched,
            and the whole only where the whole model is compared.
        output: Folder of the build.
        settings: Prompt, layers and bounds.
        scratch: Folder for what is fetched, ours alone; default: the system's for temporary files.
        progress: Called with layers done and layers to do; the whole model counts as one more.

    Raises:
        RecipeError: The prompt is too short to exercise the selection, or a layer is not there.
        ParityError: A bound is broken, or the reference is absent or wrong.
    """
    require_float32()
    versions = require_reference() | {name: version(name) for name in ("mlx", "mlx-lm")}
    require_long_prompt(settings, checkpoint.config)
    layers = compared_layers(settings, checkpoint.config)
    tokens = prompt_tokens(checkpoint, output, settings)
    whole = len(layers) == checkpoint.config["num_hidden_layers"] and fits_memory(
        checkpoint, len(tokens)
    )
    tick = _Ticker(progress, max(layers) + 1 + whole)
    with spooled(checkpoint, scratch) as (local, spool):

        def after_layer() -> None:
            if spool:
                spool.forget()
            tick()

        streamed = stream(
            local,
            output,
            tokens,
            layers,
            keep=whole,
            judge=lambda row: enforce_layer(row, len(tokens), settings, output),
            after_layer=after_layer,
        )
    logits = None
    if whole:
        with local_folder(checkpoint, scratch) as folder:
            logits = whole_logits(folder, output, tokens, streamed.outcomes)
        tick()
    record = ParityRecord(
        versions=versions,
        tokens=len(tokens),
        prompt=prompt_kind(checkpoint, settings),
        index_topk=int(checkpoint.config["index_topk"]),
        layers=streamed.rows,
        max_layer_error=max(max(r.attention_error, r.mlp_error) for r in streamed.rows),
        ties=sum(r.tied_keys + r.tied_experts for r in streamed.rows),
        logits=logits,
        settings=settings,
        **_build_figures(streamed),
    )
    enforce(record, output)
    return record


def _build_figures(streamed: Streamed) -> dict[str, float | None]:
    """Return the build's distance from the reference, None where the pass ended early."""
    reference, build = streamed.reference_logits, streamed.build_logits
    if reference is None or build is None:
        return {"mean_kl": None, "max_kl": None, "top1_agreement": None}
    kl = kl_divergence(reference, build)
    return {
        "mean_kl": float(kl.mean()),
        "max_kl": float(kl.max()),
        "top1_agreement": top1_agreement(reference, build),
    }


class _Ticker:
    """Counts steps and reports them."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self) -> None:
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total)


def fits_memory(checkpoint: Checkpoint, tokens: int) -> bool:
    """Whether the whole model can be compared in the memory that is available now."""
    needed, available = whole_model_bytes(checkpoint, tokens), available_bytes()
    if needed > available:
        log.warning(
            "parity: logits of the whole model are not compared: that takes about %.1f GB, %.1f GB "
            "are available. Each layer is compared by itself.",
            needed / 1e9,
            available / 1e9,
        )
    return needed <= available


def whole_model_bytes(checkpoint: Checkpoint, tokens: int) -> int:
    """Return about what the comparison of the whole model takes, in bytes.

    The reference and the candidate, which hold each parameter in float32; once more what is not a
    routed expert, since the layers that were compared one by one are kept to settle ties; for each
    token six states of a layer and its selection, and four rows of logits, twice as wide in
    float64.
    """
    config = checkpoint.config
    sizes = {name: prod(info.shape) for name, info in checkpoint.tensors.items()}
    dense = sum(size for name, size in sizes.items() if ".mlp.experts." not in name)
    states = int(config["num_hidden_layers"]) * (
        6 * int(config["hidden_size"]) + 2 * int(config["index_topk"])
    )
    rows = tokens * (states + 8 * int(config["vocab_size"]))
    return _FLOAT * (2 * sum(sizes.values()) + dense + rows)


_RUNTIME = (
    "The runtime does not compute what transformers computes; do not publish. Compare its version "
    "and the config's schedule with the source's."
)
_QUALITY = "Raise the bits of the recipe's rules, or the bound if this loss is intended."


def enforce_layer(row: LayerParity, tokens: int, settings: ParitySettings, output: Path) -> None:
    """Stop at a layer that breaks a bound, before the pass goes on.

    Raises:
        ParityError: With the layer, the measure and both numbers.
    """
    bound = settings.max_layer_error
    where = f"{output}: layer {row.layer} ({row.kind})"
    for name, count in (("keys", row.wrong_keys), ("experts", row.wrong_experts)):
        if count:
            raise ParityError(
                f"{where}: {count} of {tokens} rows choose other {name} than the reference, 0 are "
                f"allowed beyond ties. {_RUNTIME}"
            )
    _check(f"{where}: attention error", row.attention_error, bound, _RUNTIME)
    _check(f"{where}: mlp error", row.mlp_error, bound, _RUNTIME)


def enforce(record: ParityRecord, output: Path) -> None:
    """Stop at the first broken bound on the whole model's logits.

    Raises:
        ParityError: With the measure and both numbers.
    """
    settings = record.settings
    if record.logits is not None:
        if record.logits.wrong:
            raise ParityError(
                f"{output}: whole model: {record.logits.wrong} rows choose other keys or experts "
                f"than the reference, 0 are allowed beyond ties. {_RUNTIME}"
            )
        for name in ("below_topk", "above_topk", "cached"):
            value, bound = getattr(record.logits, name), settings.max_logit_error
            _check(f"{output}: relative logit error ({name})", value, bound, _RUNTIME)
    quality = {
        "mean_kl": record.mean_kl,
        "max_kl": record.max_kl,
        "top1_agreement": record.top1_agreement,
    }
    for bound in settings.bounds:
        if bound.measure in quality:
            _hold(bound, quality[bound.measure], output)


def _hold(bound: Bound, value: float | None, output: Path) -> None:
    """Hold a figure of the build to a bound of the recipe; NaN breaks it."""
    if value is None:
        raise ParityError(
            f"{output}: the recipe bounds {bound.measure}, which was not measured: the pass ended "
            "before the last layer. Set parity.layers to all, or leave the bound out."
        )
    if bound.max is not None and not value <= bound.max:
        raise ParityError(
            f"{output}: {bound.measure} is {value:.4g}; the recipe's max is {bound.max:g}. "
            f"{_QUALITY}"
        )
    if bound.min is not None and not value >= bound.min:
        raise ParityError(
            f"{output}: {bound.measure} is {value:.4g}; the recipe's min is {bound.min:g}. "
            f"{_QUALITY}"
        )


def _check(what: str, value: float, bound: float, way_out: str) -> None:
    if not value <= bound:  # NaN fails too
        raise ParityError(f"{what} is {value:.3g}, the recipe allows {bound:.3g}. {way_out}")


def prompt_tokens(checkpoint: Checkpoint, output: Path, settings: ParitySettings) -> Array:
    """Return the fixed prompt, [settings.tokens].

    It is the recipe's text, repeated as needed, or the built-in one, through the tokenizer that was
    copied into the build; a source without a tokenizer gets seeded ids, on which KL says little but
    the runtime's error as much.

    Raises:
        ParityError: The recipe gives a text and the source has no tokenizer.
    """
    if prompt_kind(checkpoint, settings) == "seeded":
        rng = np.random.default_rng(settings.seed)
        return rng.integers(0, int(checkpoint.config["vocab_size"]), settings.tokens)
    from mlx_lm.utils import load_tokenizer

    try:
        tokenizer = load_tokenizer(output)
    except (OSError, ValueError) as error:
        raise ParityError(
            f"{output}: parity.prompt is a text, but there is no tokenizer: {error}. Leave it out "
            "to use seeded tokens."
        ) from None
    # Eight characters a token are enough for any tokenizer; `resize` repeats what is short.
    text = settings.prompt or held_out_text()[: 8 * settings.tokens]
    return np.resize(np.array(tokenizer.encode(text), np.int64), settings.tokens)


def prompt_kind(checkpoint: Checkpoint, settings: ParitySettings) -> str:
    """Return what the prompt is: "text" (the recipe's), "built-in text", or "seeded" tokens."""
    if settings.prompt:
        return "text"
    return "built-in text" if "tokenizer.json" in checkpoint.files else "seeded"
