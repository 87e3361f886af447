"""What is judged before anything expensive: settings against the model, texts and targets.

Each check is a function whose docstring is the sentence that `docs/plan-checks.md` shows, and a
test holds the two together. A check raises what the stage would raise hours later, and yields
warnings. To add one, write it and name it in `CHECKS`, or in `MACHINE_CHECKS` if its answer is that
of the machine which asks: `plan` may ask on another one than `run`, and only warns of those.
"""

import json
import logging
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from glm_quant.build import Build
from glm_quant.calibration.coverage import judge_coverage
from glm_quant.calibration.texts import calibration_texts, require_apart
from glm_quant.errors import GlmQuantError, ParityError, RecipeError
from glm_quant.evaluation.baselines import open_baseline
from glm_quant.evaluation.evaluate import perplexity_texts, require_measurable, require_packages
from glm_quant.evaluation.needle_prompts import build_shortest_prompts
from glm_quant.evaluation.protocols import differences
from glm_quant.evaluation.token_count import TokenCount, token_count
from glm_quant.evaluation.token_set import read_texts
from glm_quant.hub.license import require_license
from glm_quant.memory import half_of_memory
from glm_quant.parity.limits import compared_layers, require_long_prompt
from glm_quant.report.prefill import BLOCK_ELEMENTS
from glm_quant.streaming.memory_plan import plan_memory

_log = logging.getLogger(__name__)


class Subject:
    """A build that is to be judged, and what several checks ask of its source."""

    def __init__(self, build: Build) -> None:
        """Attach to an opened build."""
        self.build = build
        self.recipe, self.checkpoint = build.recipe, build.checkpoint
        self.file = build.recipe.file or build.recipe.name
        self.geometry = build.plan.glm_geometry

    @cached_property
    def count(self) -> TokenCount | None:
        """Counts a text's tokens; None where the source has no tokenizer."""
        return token_count(self.checkpoint)

    def has_file(self, name: str) -> bool:
        """Whether the source has a file."""
        return name in self.checkpoint.files


Check = Callable[[Subject], Iterator[str]]


def tokenizer_is_there(subject: Subject) -> Iterator[str]:
    """Check that the source has a tokenizer: without one nobody can prompt or evaluate a build."""
    # Config and index alone can be planned: the plan itself warns.
    if subject.count is None and subject.checkpoint.has_weights:
        raise RecipeError(
            f"{subject.checkpoint.source.uri}: there is no tokenizer.json, so nobody can prompt "
            f"the build and the evaluation of {subject.file} cannot be made. Put the release's "
            "tokenizer files beside its config.json, or use `convert`, which only warns."
        )
    yield from ()


def parity_prompt_selects(subject: Subject) -> Iterator[str]:
    """Check that `parity.tokens` is above `index_topk`, so that the indexer has to select."""
    require_long_prompt(subject.recipe.parity, subject.checkpoint.config, subject.file)
    yield from ()


def parity_layers_exist(subject: Subject) -> Iterator[str]:
    """Check that `parity.layers` are there, and reach the last if a bound is on the build."""
    parity = subject.recipe.parity
    layers = compared_layers(parity, subject.checkpoint.config, subject.file)
    last = subject.geometry.num_hidden_layers - 1
    for bound in parity.bounds:
        if bound.measure not in ("layer_error", "logit_error") and layers[-1] != last:
            raise RecipeError(
                f"{subject.file}: parity bounds {bound.measure}, which is known after layer {last};"
                f" parity.layers ends at {layers[-1]}. Set parity.layers to all."
            )
    if subject.build.targets and layers[-1] != last:
        raise RecipeError(
            f"{subject.file}: parity.layers ends at {layers[-1]} of {last}, and nothing is "
            "published whose KL parity did not measure. Set parity.layers to all."
        )
    yield from ()


def contexts_are_within_the_model(subject: Subject) -> Iterator[str]:
    """Check that no context, prompt or needle is longer than `max_position_embeddings`."""
    limit = int(subject.checkpoint.config.get("max_position_embeddings", 0))
    recipe, evaluation = subject.recipe, subject.recipe.evaluation
    thinking = evaluation.needle_thinking_tokens
    lengths = {
        "parity.tokens": recipe.parity.tokens,
        "divergence.context": recipe.divergence.context,
        "evaluation.context": evaluation.context,
        "evaluation.prompt_tokens, with generation_tokens": max(evaluation.prompt_tokens, default=0)
        + evaluation.generation_tokens,
        "evaluation.needle_lengths, with thinking": max(evaluation.needle_lengths, default=0)
        + thinking,
    }
    if recipe.own_calibration is not None:
        lengths["calibration.context"] = recipe.own_calibration.context
    if evaluation.peer_perplexity is not None:
        lengths["evaluation.peer_perplexity.sequence_length"] = (
            evaluation.peer_perplexity.sequence_length
        )
    for name, length in lengths.items():
        if limit and length > limit:
            raise RecipeError(
                f"{subject.file}: {name} is {length:,}, and the model's max_position_embeddings "
                f"{limit:,}. Make it smaller."
            )
    yield from ()


def divergence_texts_are_long_enough(subject: Subject) -> Iterator[str]:
    """Check that each text of `divergence` can be read and has tokens to compare."""
    settings = subject.recipe.divergence
    for name, text in read_texts(settings).items():
        if subject.count is None:
            continue
        tokens = subject.count(text)
        if tokens < 2:
            raise RecipeError(
                f"{subject.file}: the text of divergence.texts.{name} has {tokens} tokens; give a "
                "longer one."
            )
        if settings.texts is not None and tokens < settings.context:
            yield (
                f"{subject.file}: the text of divergence.texts.{name} has {tokens:,} tokens, the "
                f"context is {settings.context:,}: it is compared on a shorter sequence."
            )


def perplexity_texts_are_long_enough(subject: Subject) -> Iterator[str]:
    """Check that each local text for perplexity can be read and fills `evaluation.context`."""
    settings = subject.recipe.evaluation
    for name, text in perplexity_texts(settings).items():
        tokens = None if subject.count is None else subject.count(text)
        if tokens is not None and tokens < settings.context:
            raise RecipeError(
                f"{subject.file}: {name}: the text has {tokens:,} tokens, evaluation.context is "
                f"{settings.context:,}. Name a longer text in perplexity_text(s)."
            )
    yield from ()


def needles_fit_their_prompts(subject: Subject) -> Iterator[str]:
    """Check that needle prompts hold their question, and that the tokenizer chats and thinks."""
    settings = subject.recipe.evaluation
    if subject.count is not None and (settings.coherence or settings.needle_lengths):
        try:
            build_shortest_prompts(subject.count.encode, settings)
        except ValueError as error:
            raise RecipeError(f"{subject.file}: evaluation.needle_lengths: {error}.") from None
        if not _chat_template(subject):
            raise RecipeError(
                f"{subject.checkpoint.source.uri}: the tokenizer has no chat template, through "
                "which needle and coherence ask. Put chat_template.jinja beside it, or leave "
                "needle_lengths and coherence out."
            )
        thinking = settings.needle_thinking_tokens if settings.needle_lengths else 0
        if thinking and not subject.count.has_token("</think>"):
            raise RecipeError(
                f"{subject.file}: needle_thinking_tokens is {thinking}, and the tokenizer has no "
                "token </think>. Set it to 0."
            )
    yield from ()


def calibration_text_is_apart(subject: Subject) -> Iterator[str]:
    """Check that no text that the build is calibrated on is evaluated."""
    settings = subject.recipe.own_calibration
    if settings is not None:
        require_apart(subject.recipe, settings)
    yield from ()


def calibration_covers_the_experts(subject: Subject) -> Iterator[str]:
    """Check that the calibration has a whole sequence, and a token for every expert."""
    settings = subject.recipe.own_calibration
    if settings is None or subject.count is None:
        return
    lengths = map(subject.count, calibration_texts(settings).values())
    tokens = sum(min(length, settings.tokens) for length in lengths)
    yield from judge_coverage(tokens, settings, subject.checkpoint.config, subject.file)


def evaluation_can_be_read(subject: Subject) -> Iterator[str]:
    """Check that each file that the evaluation names is there and each baseline can be opened."""
    require_measurable(subject.recipe.evaluation, subject.build.baselines)
    yield from ()


def baselines_are_measured_alike(subject: Subject) -> Iterator[str]:
    """Check that a baseline whose checkpoint is gone was measured with the recipe's settings."""
    for name, place in subject.build.baselines.items():
        baseline = open_baseline(name, place)
        if baseline.checkpoint is not None or baseline.evaluation is None:
            continue
        unlike = differences(subject.recipe.evaluation, baseline.evaluation.measurements)
        if unlike:
            raise RecipeError(
                f"{place}: baseline {name!r} was measured otherwise than {subject.file} says, and "
                f"its checkpoint is not there to be measured again: {'; '.join(unlike)}. Name the "
                "checkpoint's folder, or use that build's settings."
            )
    yield from ()


def targets_may_be_written(subject: Subject) -> Iterator[str]:
    """Check that each target's address is well formed, and that the licence allows to publish."""
    for target in subject.build.targets:
        subject.build.open_target(target, "unused")
    if subject.build.targets:
        require_license(subject.checkpoint.source, subject.recipe.publish, subject.recipe.file)
    yield from ()


def packages_are_installed(subject: Subject) -> Iterator[str]:
    """Check that what parity and the evaluation's protocols use is installed."""
    require_packages(subject.recipe.evaluation)
    for name in ("torch", "transformers"):
        try:
            version(name)
        except PackageNotFoundError:
            raise ParityError(
                f"parity compares with transformers, and {name} is not installed. Install it with "
                "`uv sync --group parity` or `pip install 'glm-quant[parity]'`."
            ) from None
    yield from ()


def memory_holds_a_sequence(subject: Subject) -> Iterator[str]:
    """Check that the memory for streaming holds a sequence of divergence and calibration."""
    for settings in (subject.recipe.divergence, subject.recipe.own_calibration):
        if settings is not None:
            memory = settings.memory_bytes or half_of_memory()
            if settings is subject.recipe.own_calibration:
                memory //= 2  # the other half is for what else walks along
            plan_memory(subject.geometry, [settings.context], memory, BLOCK_ELEMENTS)
    yield from ()


CHECKS: tuple[Check, ...] = (
    tokenizer_is_there,
    parity_prompt_selects,
    parity_layers_exist,
    contexts_are_within_the_model,
    divergence_texts_are_long_enough,
    evaluation_can_be_read,
    perplexity_texts_are_long_enough,
    needles_fit_their_prompts,
    calibration_text_is_apart,
    calibration_covers_the_experts,
    baselines_are_measured_alike,
    targets_may_be_written,
)
MACHINE_CHECKS: tuple[Check, ...] = (packages_are_installed, memory_holds_a_sequence)


def judge_plan(build: Build, *, here: bool = True) -> list[str]:
    """Judge all that can be known before anything expensive.

    Args:
        build: opened.
        here: it is made on this machine; else what the machine lacks is a warning.

    Returns:
        Warnings, in the order of the checks.

    Raises:
        GlmQuantError: of the first check that fails; see `docs/plan-checks.md`.
    """
    if build.plan.geometry is None and not here:
        # The bytes of any architecture can be planned; what follows is asked of a `run`.
        return ["`convert` makes this build; `run`, which proves and measures, is for GLM so far."]
    subject = Subject(build)
    if here:
        # Config and index can be planned; a build needs the weights.
        build.checkpoint.require_weights()
    warnings = [warning for check in CHECKS for warning in check(subject)]
    for check in MACHINE_CHECKS:
        try:
            warnings += check(subject)
        except GlmQuantError as error:
            if here:
                raise
            warnings.append(f"on this machine: {error}")
    return warnings


def require_plan(build: Build) -> None:
    """Judge a build that is about to be made; warnings are logged.

    Raises:
        GlmQuantError: of the first check that fails.
    """
    for warning in judge_plan(build):
        _log.warning("%s", warning)


def checks_table() -> str:
    """Return the list of checks in Markdown, as `docs/plan-checks.md` has it."""
    rows = [
        f"| `{check.__name__}` | {(check.__doc__ or '').removeprefix('Check that ')} | {kind} |"
        for checks, kind in ((CHECKS, "error"), (MACHINE_CHECKS, "error; with `plan` a warning"))
        for check in checks
    ]
    return "\n".join(["| check | what holds | else |", "|---|---|---|", *rows])


def _chat_template(subject: Subject) -> bool:
    if subject.has_file("chat_template.jinja"):
        return True
    if not subject.has_file("tokenizer_config.json"):
        return False
    text = subject.checkpoint.source.read("tokenizer_config.json")
    config: dict[str, Any] = json.loads(text)
    return bool(config.get("chat_template"))
