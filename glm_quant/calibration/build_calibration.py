"""A build's own calibration: what its recipe wants, made once in the build's workspace.

`run` makes it as a stage, `convert` before it begins. The record's
fingerprint is of texts and files, so that it is known without a tokenizer; what was made of them is
in the digests that each weight's own fingerprint has.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from pydantic import Field

from glm_quant.artifact import FileDigest, Record
from glm_quant.calibration.calibrate import VERSION, calibrate
from glm_quant.calibration.coverage import judge_coverage
from glm_quant.calibration.one_pass import LayerError, one_pass
from glm_quant.calibration.texts import calibration_set, calibration_texts, require_apart
from glm_quant.checkpoint.imatrix import RECORD_NAME
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.checkpoint.source import FolderSource
from glm_quant.errors import RecipeError
from glm_quant.evaluation.divergence import reference_batch, reference_key
from glm_quant.evaluation.perplexity import digest_text
from glm_quant.evaluation.token_set import make_token_set
from glm_quant.fingerprint import Canonical, fingerprint
from glm_quant.memory import half_of_memory
from glm_quant.quantize.convert import Conversion, Progress
from glm_quant.recipe import Recipe
from glm_quant.settings import CalibrationSettings
from glm_quant.streaming.forward import TokenBatch
from glm_quant.workspace import Workspace

_log = logging.getLogger(__name__)
STAGE = "calibrate"

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class CalibrationRecord(Record):
    """What a build was calibrated on.

    Attributes:
        slices: tokens of each slice.
        tokens: of all.
        experts: routed experts of all layers.
        thin: of them met too few tokens and have their layer's mean instead.
        unseen: of them met none.
        weights: how many weights have importance.
        factors: how many files of factors there are.
        layers: what quantizing each layer did to its output, where one pass converted too.
    """

    slices: dict[str, int]
    tokens: int
    experts: int
    thin: int
    unseen: int
    weights: int
    factors: int
    layers: dict[int, LayerError] = Field(default_factory=dict[int, LayerError])


def calibration_inputs(checkpoint: Checkpoint, recipe: Recipe) -> Canonical:
    """Return what decides a build's own calibration."""
    settings = _settings(recipe)
    identities: dict[str, Canonical] = {
        name: checkpoint.files[name].identity for name in _TOKENIZER if name in checkpoint.files
    }
    return {
        "version": VERSION,
        "settings": settings.model_dump_json(exclude={"memory_gb", "texts", "convert"}),
        "texts": {name: digest_text(text) for name, text in calibration_texts(settings).items()},
        "factors": recipe.wants_factors,
        "source": reference_key(checkpoint, fingerprint(identities)),
    }


def calibration_fingerprint(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """Return the fingerprint of a build's own calibration."""
    return fingerprint({"stage": STAGE, "inputs": calibration_inputs(checkpoint, recipe)})


def imatrix_folder(workspace: Workspace) -> Path:
    """Return where a build's own calibration stands."""
    return workspace.calibration / "imatrix"


def converts_while_calibrating(
    checkpoint: Checkpoint, recipe: Recipe, evicts_shards: bool = False
) -> bool:
    """Whether the pass that calibrates encodes the weights too.

    Args:
        checkpoint: the source.
        recipe: of the build.
        evicts_shards: finished shards do not stay on this disk, which has no room for all of them.
    """
    settings = recipe.own_calibration
    if settings is None:
        return False
    if settings.convert == "auto":
        return not (isinstance(checkpoint.source, FolderSource) or evicts_shards)
    return settings.convert


def record_path(workspace: Workspace) -> Path:
    """Return where its record stands."""
    return workspace.records / f"{STAGE}.json"


def standing_imatrix(checkpoint: Checkpoint, recipe: Recipe, workspace: Workspace) -> Path | None:
    """Return the folder of a build's own calibration, if it wants one and has today's."""
    if recipe.own_calibration is None or not checkpoint.has_weights:
        return None
    record = CalibrationRecord.load(record_path(workspace))
    if record is None or not record.is_whole(workspace.root):
        return None
    today = record.fingerprint == calibration_fingerprint(checkpoint, recipe)
    return imatrix_folder(workspace) if today else None


def calibrate_build(
    checkpoint: Checkpoint,
    recipe: Recipe,
    workspace: Workspace,
    progress: Progress,
    *,
    reference: bool = False,
    converting: Conversion | None = None,
) -> CalibrationRecord:
    """Make what a recipe wants, or what is missing of it; the caller holds the workspace.

    Args:
        checkpoint: the source.
        recipe: wants a calibration of its own.
        workspace: of the build.
        progress: called with layers done and layers to do.
        reference: make in the same pass what the divergence stage wants of the source.
        converting: encode in the same pass what this wants to encode; see
            `converts_while_calibrating`.

    Returns:
        The record, to be saved at `record_path`.

    Raises:
        RecipeError: a text cannot be read, or is one that is evaluated.
        EvaluationError: the memory is too small for the longest sequence.
    """
    settings = _settings(recipe)
    require_apart(recipe, settings)
    tokens = calibration_set(checkpoint, settings)
    count = sum(map(len, tokens.sequences))
    for warning in judge_coverage(count, settings, checkpoint.config, recipe.file):
        _log.warning("%s", warning)
    folder = imatrix_folder(workspace)
    # Waves must not depend on whether another batch passes too: sums are rounded wave by wave, so
    # another division would change the importance, and with it the build's bytes.
    memory = (settings.memory_bytes or half_of_memory()) // 2
    divergence = _reference(checkpoint, recipe, workspace, memory) if reference else nullcontext()
    conversion = one_pass(checkpoint, recipe, converting) if converting else nullcontext()
    with divergence as extra_batch, conversion as encoder:
        imatrix = calibrate(
            checkpoint,
            tokens,
            folder,
            factors=recipe.wants_factors,
            memory_bytes=memory,
            progress=progress,
            extra_batch=extra_batch,
            encoder=encoder,
        )
    counts = [count for layer in imatrix.coverage.values() for count in layer]
    inside = folder.relative_to(workspace.root)
    files = [FileDigest.of(folder, RECORD_NAME), *imatrix.outputs]
    return CalibrationRecord(
        fingerprint=calibration_fingerprint(checkpoint, recipe),
        outputs=[file.model_copy(update={"path": str(inside / file.path)}) for file in files],
        slices={part.name: sum(map(len, part.sequences)) for part in tokens.slices},
        tokens=imatrix.tokens,
        experts=len(counts),
        thin=sum(count < imatrix.least_tokens for count in counts),
        unseen=sum(count == 0 for count in counts),
        weights=len(imatrix.weights),
        factors=len({w.factor for w in imatrix.weights.values() if w.factor}),
        layers=encoder.errors if encoder else {},
    )


def _reference(
    checkpoint: Checkpoint, recipe: Recipe, workspace: Workspace, memory_bytes: int
) -> AbstractContextManager[TokenBatch | None]:
    settings = recipe.divergence
    folder = Path(settings.references).expanduser() if settings.references else None
    return reference_batch(
        checkpoint,
        make_token_set(checkpoint, settings),
        folder or workspace.divergence,
        min(memory_bytes, settings.memory_bytes or memory_bytes),
    )


def _settings(recipe: Recipe) -> CalibrationSettings:
    settings = recipe.own_calibration
    if settings is None:
        raise RecipeError(f"{recipe.file}: the recipe wants no calibration of its own.")
    return settings
