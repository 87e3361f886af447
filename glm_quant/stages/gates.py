"""What must be true before the first byte of a build goes out."""

import math

from glm_quant.artifact import FileDigest
from glm_quant.build import Build
from glm_quant.checkpoint.manifest import load_manifest
from glm_quant.errors import EvaluationError, ParityError, PublishError
from glm_quant.evaluation.divergence import check_bounds as check_divergence
from glm_quant.evaluation.evaluate import check_bounds, require_measurable
from glm_quant.hub.license import require_license
from glm_quant.parity.check import enforce
from glm_quant.quantize.verify import verify
from glm_quant.stages.making import AssembleStage
from glm_quant.stages.proving import DivergenceStage, EvaluationStage, ParityStage
from glm_quant.stages.releasing import CardStage

# Size and time of change of every file of the builds that this process has verified.
_verified: set[tuple[tuple[str, int, int], ...]] = set()


def check_targets(build: Build) -> None:
    """Refuse, before anything expensive, what measuring and publishing would refuse in the end.

    Raises:
        RecipeError: a text, a file or a baseline of the recipe cannot be read.
        EvaluationError: what the recipe measures with is not installed.
        PublishError: a target's address is malformed, or the licence stands in the way.
    """
    require_measurable(build.recipe.evaluation, build.baselines)
    for target in build.targets:
        build.open_target(target, "unused")
    if build.targets:
        require_license(build.checkpoint.source, build.recipe.publish, build.recipe.file)


def publishable_files(build: Build) -> list[FileDigest]:
    """Return the files of a build that may be published.

    Raises:
        PublishError: a record or a number is missing, a bound is broken, or the licence stands in
            the way.
        IntegrityError: the build on disk is not what was recorded.
    """
    require_license(build.checkpoint.source, build.recipe.publish, build.recipe.file)
    made, card = AssembleStage(build).current(), CardStage(build).current()
    _require_proof(build)
    if made is None or card is None:
        missing = "assemble" if made is None else "card"
        raise PublishError(
            f"{build.workspace.root}: stage {missing!r} is not done, so there is nothing to "
            "publish. Run the flow again: it does what is left."
        )
    _verify_once(build)
    for file in card.outputs:
        file.check(build.workspace.checkpoint)
    return [*made.outputs, *card.outputs]


def _require_proof(build: Build) -> None:
    parity, evaluation = ParityStage(build).current(), EvaluationStage(build).current()
    divergence = DivergenceStage(build).current()
    if parity is None or divergence is None or evaluation is None:
        records = {"parity": parity, "divergence": divergence, "evaluate": evaluation}
        missing = next(stage for stage, record in records.items() if record is None)
        raise PublishError(
            f"{build.workspace.root}: stage {missing!r} has no passing record for this build, and "
            "nothing is published unproved. Run the flow again: it does what is left."
        )
    try:
        enforce(parity.found, build.workspace.checkpoint)
        check_divergence(divergence, build.recipe.divergence)
        check_bounds(evaluation, build.recipe.evaluation)
    except (ParityError, EvaluationError) as error:
        raise PublishError(f"a bound of the recipe is broken: {error}") from None
    perplexity = evaluation.measurements.perplexity
    numbers = {
        "parity: mean KL": parity.found.mean_kl,
        "parity: top-1 agreement": parity.found.top1_agreement,
        "parity: largest layer error": parity.found.max_layer_error,
        "divergence: mean KL": divergence.row().mean_kl.value,
        "evaluation: perplexity": max((text.value for text in perplexity), default=None),
    }
    for name, value in numbers.items():
        if value is None or not math.isfinite(value):
            raise PublishError(
                f"{build.workspace.root}: {name} is {value}: it was not measured. Let the recipe "
                "measure it (parity.layers: all, a perplexity text) and run the flow again."
            )


def _verify_once(build: Build) -> None:
    """Verify the build, unless this process did and no file changed since."""
    folder = build.workspace.checkpoint
    manifest = load_manifest(folder)
    paths = [folder / file.path for file in (*(s.file for s in manifest.shards), *manifest.files)]
    state = tuple(
        (str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.exists()
    )
    if len(state) == len(paths) and state in _verified:
        return
    verify(folder)
    _verified.add(state)
