"""The job of the process that loads a build and measures it: a request in, measurements out."""

import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, cast

import mlx.core as mx

from glm_quant import __version__
from glm_quant.errors import EvaluationError
from glm_quant.evaluation.coherence import measure_coherence
from glm_quant.evaluation.needle import measure_needle
from glm_quant.evaluation.peer_records import Harness, PeerPerplexity
from glm_quant.evaluation.perplexity import digest_text, measure_perplexity
from glm_quant.evaluation.records import (
    Coherence,
    Measurements,
    Needle,
    Perplexity,
    Speed,
)
from glm_quant.evaluation.request import Request
from glm_quant.evaluation.speed import (
    choose_arithmetic,
    load_build,
    measure_speed,
    peak_rss_bytes,
    this_machine,
    warm_up,
    wired,
)
from glm_quant.evaluation.token_set import encode_text
from glm_quant.settings import EvaluationSettings

Tick = Callable[[int], None]

# About what an item of a task takes, with its choices.
_ITEM_TOKENS = 128


def measure(request: Request, progress: Callable[[int, int], None]) -> Measurements:
    """Measure everything that the request's settings ask for.

    Args:
        request: build, settings and text.
        progress: called with tokens done and tokens to do.

    Raises:
        EvaluationError: the text is too short.
    """
    begin = time.perf_counter()
    settings = request.settings
    model, tokenizer, load = load_build(request.checkpoint)
    texts = {request.text_name: request.text, **request.texts, **_texts_of_the_hub(settings)}
    tokens = {name: _tokens(tokenizer, name, text, settings) for name, text in texts.items()}
    arithmetic = choose_arithmetic(model)
    scored = {name: ids[: settings.perplexity_tokens] for name, ids in tokens.items()}
    tick = _ticker(progress, sum(len(ids) - 1 for ids in scored.values()) + _work(settings))
    peak = mx.get_peak_memory()
    with wired(model):
        mx.reset_peak_memory()
        perplexity = [
            _perplexity(model, name, texts[name], scored[name], settings, tick) for name in texts
        ]
        peak = max(peak, mx.get_peak_memory())
        speed = _speeds(model, tokens[request.text_name], settings, tick)
        mx.reset_peak_memory()
        needle, coherence = _probes(model, tokenizer, request, tick)
        resident = peak_rss_bytes()
        peak = max(peak, mx.get_peak_memory(), *(s.mlx_peak_bytes for s in speed))
        peer, harness = _peers(model, tokenizer, settings, tick)
    return Measurements(
        machine=this_machine(),
        arithmetic=arithmetic,
        versions=_versions(),
        load=load,
        perplexity=perplexity,
        speed=speed,
        needle=needle,
        peak_rss_bytes=resident,
        mlx_peak_bytes=peak,
        seconds=round(time.perf_counter() - begin, 3),
        peer_perplexity=peer,
        harness=harness,
        coherence=coherence,
    )


def _perplexity(
    model: Any, name: str, text: str, tokens: list[int], settings: EvaluationSettings, tick: Tick
) -> Perplexity:
    return measure_perplexity(
        model,
        tokens,
        context=settings.context,
        stride=settings.stride,
        text=name,
        text_sha256=digest_text(text),
        progress=tick,
    )


def _probes(
    model: Any, tokenizer: Any, request: Request, tick: Tick
) -> tuple[Needle | None, Coherence | None]:
    settings = request.settings
    needle = coherence = None
    if settings.needle_lengths:
        needle = measure_needle(model, tokenizer, request.text, settings, tick)
    if settings.coherence:
        coherence = measure_coherence(model, tokenizer, settings.coherence, tick)
    return needle, coherence


def _peers(
    model: Any, tokenizer: Any, settings: EvaluationSettings, tick: Tick
) -> tuple[PeerPerplexity | None, Harness | None]:
    """Measure by the peers' own code; imported here, since few recipes ask for it."""
    perplexity = harness = None
    _forget_torch()
    if settings.peer_perplexity:
        from glm_quant.evaluation.mlx_lm_protocols import measure_peer_perplexity

        perplexity = measure_peer_perplexity(model, tokenizer, settings.peer_perplexity, tick)
    if settings.harness:
        from glm_quant.evaluation.harness import measure_harness

        harness = measure_harness(model, tokenizer, settings.harness)
        tick(_harness_work(settings))
    return perplexity, harness


def _texts_of_the_hub(settings: EvaluationSettings) -> dict[str, str]:
    if not settings.perplexity_datasets:
        return {}
    _forget_torch()
    from glm_quant.evaluation.mlx_lm_protocols import load_text

    return {name: load_text(each) for name, each in settings.perplexity_datasets.items()}


def _forget_torch() -> None:
    # The process blocks torch; datasets imports torch where it finds its name in sys.modules.
    if "torch" in sys.modules and cast("Any", sys.modules["torch"]) is None:
        del sys.modules["torch"]


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("mlx", "mlx-lm", "transformers")}
    return {"glm-quant": __version__, **packages}


def _speeds(model: Any, tokens: list[int], settings: EvaluationSettings, tick: Tick) -> list[Speed]:
    warm_up(model, tokens)
    speeds: list[Speed] = []
    for length in settings.prompt_tokens:
        # A short text is repeated: the speed does not depend on what the prompt says.
        prompt = (tokens * (length // len(tokens) + 1))[:length]
        speeds.append(measure_speed(model, prompt, settings.generation_tokens))
        tick(length)
    return speeds


def _tokens(tokenizer: Any, name: str, text: str, settings: EvaluationSettings) -> list[int]:
    tokens = encode_text(tokenizer, text)
    if len(tokens) < settings.context:
        raise EvaluationError(
            f"{name}: the text has {len(tokens):,} tokens, the context is "
            f"{settings.context:,}. Name a longer text in the recipe's perplexity_text(s)."
        )
    return tokens


def _work(settings: EvaluationSettings) -> int:
    """Return the tokens to go through, apart from the strided texts."""
    cells = len(settings.needle_depths) * settings.needle_repeats
    work = sum(settings.prompt_tokens) + sum(settings.needle_lengths) * cells
    if settings.coherence:
        work += settings.coherence.tokens * len(settings.coherence.prompts)
    if peer := settings.peer_perplexity:
        work += peer.num_samples * (peer.sequence_length - 1)
    return work + _harness_work(settings)


def _harness_work(settings: EvaluationSettings) -> int:
    """Return about how many tokens the harness's tasks have: they are told when all is done."""
    if settings.harness is None:
        return 0
    return len(settings.harness.tasks) * (settings.harness.limit or 1000) * _ITEM_TOKENS


def _ticker(progress: Callable[[int, int], None], total: int) -> Tick:
    done = 0

    def tick(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done, total)

    return tick
