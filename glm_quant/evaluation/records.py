"""What an evaluation leaves behind: each number with the way it was measured.

Times and memory hold for the machine that is named beside them; the rest holds for the bytes of the
build. Sizes are bytes, times are seconds.
"""

import math
from collections import defaultdict

from pydantic import BaseModel, ConfigDict

from glm_quant.artifact import Record
from glm_quant.evaluation.peer_records import Harness, PeerPerplexity


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Machine(_Part):
    """Where something was measured.

    Attributes:
        system: operating system and processor architecture, such as "Darwin arm64".
        processor: the chip's name as the system gives it.
        cores: logical processors.
        memory_bytes: physical memory.
        device: what MLX computed on, "gpu" or "cpu".
        is_apple_silicon: whether speeds speak for the machines that MLX is made for.
    """

    system: str
    processor: str
    cores: int
    memory_bytes: int
    device: str
    is_apple_silicon: bool

    def describe(self) -> str:
        """Return one line for a person."""
        memory = self.memory_bytes / 2**30
        return (
            f"{self.processor} ({self.system}, {self.cores} cores, {memory:.0f} GB, {self.device})"
        )


class Perplexity(_Part):
    """Perplexity on one text.

    Attributes:
        text: the text's name.
        text_sha256: of the whole text, before it is cut to `tokens`.
        tokens: tokens of the text that were used.
        scored_tokens: tokens whose probability counts: all but the first.
        context: tokens in a window.
        stride: tokens from one window's begin to the next.
        windows: number of windows.
        mean_nll: mean negative log-likelihood in nats.
        value: exp(mean_nll).
        standard_error: of `value`, from the scatter of the windows' means; None for one window.
        method: how it was measured, in one sentence.
        window_nll: summed negative log-likelihood of each window in nats, to be paired with
            another build's; empty in records of old.
        window_tokens: scored tokens of each window.
    """

    text: str
    text_sha256: str
    tokens: int
    scored_tokens: int
    context: int
    stride: int
    windows: int
    mean_nll: float
    value: float
    standard_error: float | None
    method: str
    window_nll: list[float] = []
    window_tokens: list[int] = []


class Speed(_Part):
    """Generation after one prompt: greedy, batch of one, end tokens ignored.

    Attributes:
        prompt_tokens: length of the prompt.
        generated_tokens: tokens made after it.
        prefill_seconds: until the first token was there.
        decode_seconds: for the tokens after the first.
        mlx_peak_bytes: MLX's own peak during this generation, weights included.
    """

    prompt_tokens: int
    generated_tokens: int
    prefill_seconds: float
    decode_seconds: float
    mlx_peak_bytes: int

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """Generated tokens a second, without the first, whose time is the prompt's."""
        return (self.generated_tokens - 1) / self.decode_seconds


class NeedleTrial(_Part):
    """One hidden fact asked for.

    Attributes:
        length: asked-for length of the prompt in tokens: a row of the grid.
        depth: place of the fact, 0 begin to 1 end: a column of the grid.
        prompt_tokens: length with the chat template.
        phrasing: which of the phrasings asked.
        expected: the code that the reply must give first.
        reply: what came, after the thinking.
        reply_tokens: tokens made, thinking included; 0 in records of old.
    """

    length: int
    depth: float
    prompt_tokens: int
    phrasing: int
    expected: str
    reply: str
    retrieved: bool
    reply_tokens: int = 0


class Needle(_Part):
    """Retrieval of one fact from a long prompt.

    Attributes:
        text_sha256: of the text that the facts were hidden in.
        method: how it was measured, in one sentence.
        phrasings: the question of each phrasing, with {name} for whom it asks about.
        thinking_tokens: tokens that the model may think before it must answer; 0: thinking off.
    """

    text_sha256: str
    method: str
    trials: list[NeedleTrial]
    phrasings: list[str] = []
    thinking_tokens: int = 0

    @property
    def score(self) -> float:
        """Share of all trials that retrieved."""
        return sum(trial.retrieved for trial in self.trials) / len(self.trials)

    @property
    def longest_prompt_tokens(self) -> int:
        """Tokens of the longest prompt from which the fact was retrieved; 0 if never."""
        return max((t.prompt_tokens for t in self.trials if t.retrieved), default=0)

    def grid(self) -> dict[int, dict[float, float]]:
        """Return the share retrieved by length and depth."""
        cells: dict[tuple[int, float], list[bool]] = defaultdict(list)
        for trial in self.trials:
            cells[trial.length, trial.depth].append(trial.retrieved)
        rows: dict[int, dict[float, float]] = defaultdict(dict)
        for (length, depth), hits in sorted(cells.items()):
            rows[length][depth] = sum(hits) / len(hits)
        return dict(rows)

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the score (Wilson, JASA 22 (1927) 209)."""
        n, p, z = len(self.trials), self.score, 1.959964
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(middle - half, 0.0), min(middle + half, 1.0)


class LongOutput(_Part):
    """One long greedy output, and how much of it repeats.

    Attributes:
        prompt: what the user said.
        tokens: length of the output.
        ended: whether the model ended it by itself.
        repeated_share: share of the output's n-grams that stood in it before.
        longest_repeat: tokens of the longest span that stands in it twice or more.
        loop_period: tokens after which the end of the output repeats itself; None: it does not.
        text: the output, its middle left out where it is long.
    """

    prompt: str
    tokens: int
    ended: bool
    repeated_share: float
    longest_repeat: int
    loop_period: int | None
    text: str


class Coherence(_Part):
    """Loops and repeats in long greedy outputs.

    Attributes:
        ngram: tokens of the n-grams that are counted.
        method: how it was measured, in one sentence.
    """

    ngram: int
    method: str
    outputs: list[LongOutput]

    @property
    def loops(self) -> int:
        """Outputs that end in a loop."""
        return sum(output.loop_period is not None for output in self.outputs)

    @property
    def repeated_share(self) -> float:
        """Share of repeated n-grams in the worst output."""
        return max(output.repeated_share for output in self.outputs)

    @property
    def longest_repeat(self) -> int:
        """Tokens of the longest repeated span of any output."""
        return max(output.longest_repeat for output in self.outputs)


class Load(_Part):
    """Loading through stock mlx-lm.

    Attributes:
        seconds: until every weight was in memory; files may have been in the system's cache.
        mlx_bytes: MLX's memory in use afterwards.
    """

    seconds: float
    mlx_bytes: int


class Measurements(_Part):
    """All that the worker measures in one process.

    Attributes:
        arithmetic: what the model was computed in.
        versions: packages that the numbers depend on.
        perplexity: strided, a text each.
        speed: a prompt length each.
        peak_rss_bytes: peak resident memory of the process, before the peers' protocols, whose
            libraries and data would count.
        mlx_peak_bytes: MLX's own peak, likewise.
        seconds: wall time of the whole evaluation.
        peer_perplexity: None where the recipe does not ask for it, as the next two.
        harness: tasks of lm-evaluation-harness.
        coherence: of long outputs.
    """

    machine: Machine
    arithmetic: str
    versions: dict[str, str]
    load: Load
    perplexity: list[Perplexity]
    speed: list[Speed]
    needle: Needle | None
    peak_rss_bytes: int
    mlx_peak_bytes: int
    seconds: float
    peer_perplexity: PeerPerplexity | None = None
    harness: Harness | None = None
    coherence: Coherence | None = None


class Comparison(_Part):
    """One figure of this build beside a baseline's.

    Attributes:
        measure: the figure's name, as bounds write it.
        baseline: the baseline's name in the recipe.
        value: this build's.
        baseline_value: the baseline's.
        difference: value less baseline_value.
        standard_error: of `difference`; None where it is not known, as for times.
        pairs: windows, prompts or items that both went through and whose differences the error is
            taken from; 0 where they cannot be paired.
    """

    measure: str
    baseline: str
    value: float
    baseline_value: float
    difference: float
    standard_error: float | None
    pairs: int


class BaselineMeasurements(_Part):
    """Another build, measured by the same settings or read from its own record.

    Attributes:
        name: what the recipe calls it.
        build: sha256 that identifies the build, as evaluations' fingerprints take it.
    """

    name: str
    build: str
    measurements: Measurements


class EvaluationRecord(Record):
    """The evaluation of one build, and of its recipe's baselines.

    Attributes:
        baselines: what else was measured, or was before.
        comparisons: every figure that this build and a baseline share.
    """

    measurements: Measurements
    baselines: tuple[BaselineMeasurements, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
