"""What a recipe may say about measuring a build, and the bounds that stop it before publishing."""

import re
from collections.abc import Iterable, Sequence
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# What the divergence stage looks at without being told otherwise, and what bounds may be on.
BUILT_IN_SLICES = ("english", "code", "chinese", "chat")
PARITY_FIGURES = ("layer_error", "logit_error", "mean_kl", "max_kl", "top1_agreement")
DIVERGENCE_FIGURES = ("mean_kl", "p99_kl", "top1_agreement", "nll_difference", "perplexity")


class Section(BaseModel):
    """A part of a recipe: frozen, and a key that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Bound(Section):
    """A limit on one figure, by itself or beside that of a baseline.

    With a baseline the figure less the baseline's is bounded, or with `ratio` the figure over the
    baseline's.
    """

    measure: str
    min: float | None = None
    max: float | None = None
    baseline: str | None = None
    ratio: bool = False

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError(f"the bound on {self.measure} needs `min` or `max`")
        if self.ratio and self.baseline is None:
            raise ValueError(f"the bound on {self.measure} is a `ratio`, but to no `baseline`")
        return self


def require_measured(bounds: Iterable[Bound], measured: Sequence[str]) -> None:
    """Check that a stage measures what its bounds are on.

    Raises:
        ValueError: a bound is on something else; names what there is.
    """
    for bound in bounds:
        if bound.measure not in measured:
            raise ValueError(
                f"a bound is on {bound.measure!r}, which is not measured here; there is "
                f"{', '.join(measured)}"
            )


class TokenSettings(Section):
    """Texts, and how many tokens of them, in sequences of which length."""

    texts: dict[str, str] | None = Field(
        default=None, description="text file of each slice; default: built-in ones"
    )
    tokens: int = Field(default=2048, ge=16, description="at most so many tokens of each slice")
    context: int = Field(default=512, ge=16, description="tokens of a sequence")
    seed: int = 0
    memory_gb: float | None = Field(
        default=None, gt=0, description="memory for the pass; default: half of the machine's"
    )

    @property
    def memory_bytes(self) -> int | None:
        """The memory for the pass in bytes, if it is limited."""
        return None if self.memory_gb is None else int(self.memory_gb * 1e9)

    @model_validator(mode="after")
    def _one_sequence_at_least(self) -> Self:
        if self.tokens < self.context:
            raise ValueError(
                f"tokens is {self.tokens} and context {self.context}: a slice would hold less than "
                "one sequence; make tokens larger or context smaller"
            )
        return self


class CalibrationSettings(TokenSettings):
    """What passes through the source to see each weight's inputs; never a text that is evaluated.

    The built-in texts are English, Chinese, some other languages, code, and chat.
    """

    tokens: int = Field(default=8192, ge=16, description="at most so many tokens of each slice")
    # Decides no byte: what one pass makes, several make the same.
    convert: Literal["auto"] | bool = Field(
        default="auto",
        description="encode each layer as soon as it is calibrated, from bytes that are here "
        "anyway; auto: where the source is not a folder, unless finished shards leave this disk",
    )


class DivergenceSettings(TokenSettings):
    """What source and build are compared on, streamed, and the bounds on their distance.

    The built-in texts are `BUILT_IN_SLICES`.
    """

    references: str | None = Field(
        default=None, description="folder for the source's states, to share them between workspaces"
    )
    bounds: tuple[Bound, ...] = ()

    def measures(self) -> list[str]:
        """Return the names of the figures that bounds may be on."""
        slices = list(self.texts or BUILT_IN_SLICES)
        parts = [f"/{name}" for name in slices] if len(slices) > 1 else []
        return [f"{name}{part}" for name in DIVERGENCE_FIGURES for part in ("", *parts)]

    @model_validator(mode="after")
    def _bounds_are_measured(self) -> Self:
        require_measured(self.bounds, self.measures())
        return self


class PeerPerplexitySettings(Section):
    """`mlx_lm.perplexity`: its options, under its names and, but for the length, its defaults."""

    data_path: str = Field(default="allenai/tulu-3-sft-mixture", description="a dataset of the Hub")
    file: str | None = Field(
        default=None,
        description="JSON lines in the dataset's schema, instead of the Hub's; `shipped:NAME` is a "
        "small file of this project's",
    )
    sequence_length: int = Field(default=2048, ge=2)
    num_samples: int = Field(default=50, ge=1)
    seed: int = 123
    batch_size: int = Field(default=8, ge=1)


class TextDatasetSettings(Section):
    """A text on the Hub: the rows of one column, with an empty line between them."""

    path: str = Field(default="Salesforce/wikitext", description="a dataset of the Hub")
    config: str = "wikitext-2-raw-v1"
    split: str = "test"
    column: str = "text"


class HarnessSettings(Section):
    """`mlx_lm.evaluate`: tasks of lm-evaluation-harness, under the command's names."""

    tasks: tuple[str, ...] = Field(default=("hellaswag", "piqa", "winogrande"), min_length=1)
    files: dict[str, str] = Field(
        default={}, description="JSON lines in a task's schema, instead of the Hub's dataset"
    )
    metrics: dict[str, str] = Field(
        default={"hellaswag": "acc_norm"}, description="which metric counts; default: acc"
    )
    num_shots: int | None = 0
    limit: int | None = Field(default=500, ge=1, description="items of each task")
    seed: int = 123
    batch_size: int = Field(default=8, ge=1)
    chat_template: bool | None = Field(
        default=None, description="default: as the command, where the build has one"
    )

    @model_validator(mode="after")
    def _files_are_of_tasks(self) -> Self:
        strangers = sorted(set(self.files) - set(self.tasks))
        if strangers:
            raise ValueError(f"files has {', '.join(strangers)}, tasks has not")
        return self


class CoherenceSettings(Section):
    """Long greedy outputs, searched for loops and repeats."""

    prompts: tuple[str, ...] = Field(
        default=(
            "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
            "Write a Python module that parses arithmetic expressions, with tests.",
            "用中文写一篇关于城市与河流的短文。",
        ),
        min_length=1,
    )
    tokens: int = Field(default=1024, ge=16, description="length of each output")
    ngram: int = Field(default=8, ge=2, description="tokens of what counts as a repeat")


class EvaluationSettings(Section):
    """What the evaluation stage measures and its bounds."""

    perplexity_text: str | None = Field(
        default=None, description="text file; default: the built-in text"
    )
    perplexity_texts: dict[str, str] = Field(
        default={}, description="further text files by name, such as wikitext or code"
    )
    perplexity_datasets: dict[str, TextDatasetSettings] = Field(
        default={}, description="texts on the Hub by name; `{wikitext: {}}` is WikiText-2's test"
    )
    perplexity_tokens: int = Field(
        default=4096, ge=64, description="at most so many tokens of each text, from its beginning"
    )
    context: int = Field(default=512, ge=16)
    stride: int = Field(default=256, ge=1)
    generation_tokens: int = Field(default=64, ge=2)
    prompt_tokens: tuple[int, ...] = (128,)
    needle_lengths: tuple[int, ...] = ()
    needle_depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    needle_repeats: int = Field(
        default=4, ge=1, description="prompts for each length and depth, in turning phrasings"
    )
    needle_thinking_tokens: int = Field(
        default=0, ge=0, description="tokens to think in before the answer; 0: thinking off"
    )
    peer_perplexity: PeerPerplexitySettings | None = None
    harness: HarnessSettings | None = None
    coherence: CoherenceSettings | None = None
    bounds: tuple[Bound, ...] = ()

    def measures(self) -> list[str]:
        """Return the names of the figures that bounds may be on."""
        texts = [*self.perplexity_texts, *self.perplexity_datasets]
        names = ["perplexity", *(f"perplexity/{name}" for name in texts)]
        names += ["needle"] if self.needle_lengths else []
        names += ["peer_perplexity"] if self.peer_perplexity else []
        names += [f"harness/{task}" for task in self.harness.tasks] if self.harness else []
        names += ["loops", "repeated_share", "longest_repeat"] if self.coherence else []
        names += [f"{rate}/{n}" for n in self.prompt_tokens for rate in ("prefill", "decode")]
        return [*names, "load_seconds", "peak_rss_gb", "mlx_peak_gb"]

    @model_validator(mode="after")
    def _bounds_are_measured(self) -> Self:
        require_measured(self.bounds, self.measures())
        return self

    @model_validator(mode="after")
    def _names_are_plain(self) -> Self:
        for name in self.perplexity_datasets:
            if name in self.perplexity_texts:
                raise ValueError(
                    f"perplexity_datasets and perplexity_texts both have {name!r}; name one "
                    "otherwise"
                )
        for name in (*self.perplexity_texts, *self.perplexity_datasets):
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(
                    f"a text for perplexity: {name!r} is no plain name (letters, digits, .-_)"
                )
        return self

    @model_validator(mode="after")
    def _every_token_scored(self) -> Self:
        if self.stride >= self.context:
            raise ValueError(
                f"stride is {self.stride} and context {self.context}: a window's first new token "
                "needs one before it; make stride smaller than context"
            )
        return self
