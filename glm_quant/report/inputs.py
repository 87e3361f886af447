"""What a card and a summary are made of: the contents of the records, plain and typed."""

from dataclasses import dataclass

from glm_quant.errors import CardError
from glm_quant.evaluation.divergence_record import DivergenceRecord
from glm_quant.evaluation.records import EvaluationRecord
from glm_quant.model.geometry import Geometry
from glm_quant.quantize.plan import GroupTotals
from glm_quant.recipe import Recipe
from glm_quant.report.correctness import ParityRow


@dataclass(frozen=True)
class PlanFacts:
    """The plan: `groups` largest first; `context_limit` is config.json's, 0 where it has none."""

    geometry: Geometry
    groups: tuple[GroupTotals, ...]
    params: int
    tensor_bytes: int
    tensors: int
    dropped_tensors: int
    context_limit: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensors per parameter."""
        return self.tensor_bytes * 8 / self.params


@dataclass(frozen=True)
class SourceFacts:
    """The source as it was found; `revision` where the source has one."""

    uri: str
    revision: str | None
    shards: int
    tensors: int
    size_bytes: int


@dataclass(frozen=True)
class BuildFacts:
    """The finished build: `versions` are of the packages that decide its bytes."""

    shards: int
    size_bytes: int
    manifest_sha256: str
    weights_fingerprint: str
    versions: dict[str, str]


@dataclass(frozen=True)
class CardInputs:
    """Everything that a card is made of. What is None was not recorded, and the card refuses.

    Attributes:
        recipe: as it was parsed.
        command: the one command that makes the build again.
        layer_errors: how far the build is from the source after each layer, as `layer_errors` takes
            it from the parity record; empty where the build was not followed.
    """

    recipe: Recipe
    command: str
    source: SourceFacts | None
    plan: PlanFacts | None
    build: BuildFacts | None
    parity: tuple[ParityRow, ...] | None
    divergence: DivergenceRecord | None
    evaluation: EvaluationRecord | None
    layer_errors: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """The build's name on the Hub, without the organisation."""
        return (self.recipe.publish.name or self.recipe.name).rpartition("/")[2]


def missing_record(build: str, stage: str) -> CardError:
    """Return the refusal to tell of a build without the record of a stage."""
    return CardError(
        f"{build}: the card needs the record of stage {stage!r}, which is missing. Run the "
        "flow again: it does what is left, and the card states nothing that was not measured."
    )
