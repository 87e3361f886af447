"""What the peers' own protocols leave behind: `mlx_lm.perplexity` and `mlx_lm.evaluate`."""

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PeerPerplexity(_Part):
    """Perplexity by the protocol, and the code, of `mlx_lm.perplexity`.

    Attributes:
        dataset: a dataset of the Hub, or the name of a local file.
        dataset_sha256: of the local file; None for the Hub.
        sequence_length: tokens of a sequence; all but the first are scored.
        samples: number of sequences.
        seed: of the order in which the dataset's rows are taken.
        batch_size: sequences at a time.
        value: the perplexity, as `mlx_lm.perplexity` prints it.
        standard_error: as it prints it; takes all tokens for independent, so it is too small.
        sequence_nll: mean negative log-likelihood of each sequence in nats.
        method: how it was measured, in one sentence.
    """

    dataset: str
    dataset_sha256: str | None
    sequence_length: int
    samples: int
    seed: int
    batch_size: int
    value: float
    standard_error: float
    sequence_nll: list[float]
    method: str


class HarnessScore(_Part):
    """One metric of one task.

    Attributes:
        metric: its name in lm-evaluation-harness, such as "acc_norm".
        value: mean over the items.
        standard_error: as the harness gives it; None where it gives none.
    """

    metric: str
    value: float
    standard_error: float | None

    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval, value ± 1.96 standard errors; None without an error."""
        if self.standard_error is None:
            return None
        half = 1.959964 * self.standard_error
        return self.value - half, self.value + half


class HarnessTask(_Part):
    """One task of lm-evaluation-harness.

    Attributes:
        task: the harness's name, such as "hellaswag".
        version: of the task in the harness.
        dataset: a dataset of the Hub, or the name of a local file.
        dataset_sha256: of the local file; None for the Hub.
        metric: the one that counts: for bounds, columns and `items`.
        scores: every metric that the harness reports.
        items: value of `metric` of each item, in the dataset's order, to be paired.
    """

    task: str
    version: str
    dataset: str
    dataset_sha256: str | None
    metric: str
    scores: list[HarnessScore]
    items: list[float]

    @property
    def score(self) -> HarnessScore:
        """The score that counts."""
        return next(score for score in self.scores if score.metric == self.metric)


class Harness(_Part):
    """Tasks by the protocol, and the code, of `mlx_lm.evaluate`.

    Attributes:
        version: of lm-evaluation-harness.
        shots: examples before each question; None: the task's own number.
        limit: at most so many items of each task; None for all.
        seed: of the harness.
        chat_template: whether questions go through the build's chat template.
        method: how it was measured, in one sentence.
    """

    version: str
    shots: int | None
    limit: int | None
    seed: int
    chat_template: bool
    method: str
    tasks: list[HarnessTask]
