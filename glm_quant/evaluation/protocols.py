"""Whether a record's figures were measured as a recipe's settings would measure them."""

from collections.abc import Iterator

from glm_quant.evaluation.evaluate import perplexity_texts
from glm_quant.evaluation.perplexity import digest_text
from glm_quant.evaluation.records import Measurements, Perplexity
from glm_quant.settings import EvaluationSettings


def differences(settings: EvaluationSettings, measured: Measurements) -> list[str]:
    """Return which settings differ from those of a record, in words with both values."""
    return [
        *_perplexity(settings, measured.perplexity),
        *_needle(settings, measured),
        *_peers(settings, measured),
    ]


def _differs(name: str, ours: object, theirs: object) -> Iterator[str]:
    if ours != theirs:
        yield f"evaluation.{name} is {ours}, the baseline's {theirs}"


def _perplexity(settings: EvaluationSettings, measured: list[Perplexity]) -> Iterator[str]:
    """Yield what differs of the first text, whose settings are those of all, then of each text."""
    if measured:
        yield from _differs("context", settings.context, measured[0].context)
        yield from _differs("stride", settings.stride, measured[0].stride)
        # A text that is shorter than it may be is scored whole.
        if max(text.tokens for text in measured) > settings.perplexity_tokens:
            yield from _differs(
                "perplexity_tokens",
                settings.perplexity_tokens,
                max(text.tokens for text in measured),
            )
    known = {text.text_sha256 for text in measured}
    for name, text in perplexity_texts(settings).items():
        if digest_text(text) not in known:
            yield f"the baseline was not measured on the text {name}"


def _needle(settings: EvaluationSettings, measured: Measurements) -> Iterator[str]:
    if not settings.needle_lengths:
        return
    if measured.needle is None:
        yield "the baseline has no needle score"
        return
    trials = measured.needle.trials
    lengths = tuple(dict.fromkeys(trial.length for trial in trials))
    depths = tuple(dict.fromkeys(trial.depth for trial in trials))
    yield from _differs("needle_lengths", settings.needle_lengths, lengths)
    yield from _differs("needle_depths", settings.needle_depths, depths)
    repeats = len(trials) // max(len(lengths) * len(depths), 1)
    yield from _differs("needle_repeats", settings.needle_repeats, repeats)
    thinking = measured.needle.thinking_tokens
    yield from _differs("needle_thinking_tokens", settings.needle_thinking_tokens, thinking)


def _peers(settings: EvaluationSettings, measured: Measurements) -> Iterator[str]:
    peer, theirs = settings.peer_perplexity, measured.peer_perplexity
    if peer is not None and theirs is None:
        yield "the baseline has no peer_perplexity"
    if peer is not None and theirs is not None:
        place = "peer_perplexity."
        yield from _differs(place + "sequence_length", peer.sequence_length, theirs.sequence_length)
        yield from _differs(place + "num_samples", peer.num_samples, theirs.samples)
        yield from _differs(place + "seed", peer.seed, theirs.seed)
    if settings.harness is not None:
        have = {task.task for task in measured.harness.tasks} if measured.harness else set[str]()
        for task in settings.harness.tasks:
            if task not in have:
                yield f"the baseline has no harness/{task}"
