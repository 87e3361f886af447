"""Nothing goes out unproved, and what would be refused in the end is refused at the beginning."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_quant.artifact import FileDigest
from glm_quant.build import Build, BuildSpec
from glm_quant.data import tiny_glm_path
from glm_quant.errors import IntegrityError, PublishError
from glm_quant.evaluation.compare import Positions
from glm_quant.evaluation.divergence_record import DivergenceRecord, PassFacts, make_rows
from glm_quant.evaluation.records import (
    EvaluationRecord,
    Load,
    Measurements,
    Perplexity,
)
from glm_quant.parity.check import ParityRecord
from glm_quant.plan_checks import judge_plan
from glm_quant.recipe import ParitySettings
from glm_quant.settings import Bound
from glm_quant.stages.approval import give_word, identity, last_word
from glm_quant.stages.assemble import AssembleStage
from glm_quant.stages.card import CardRecord, CardStage
from glm_quant.stages.divergence import DivergenceStage
from glm_quant.stages.download import DownloadStage
from glm_quant.stages.evaluate import EvaluationStage
from glm_quant.stages.parity import ParityStage, ParityStageRecord
from glm_quant.stages.plan import PlanStage
from glm_quant.stages.publish import PublishStage, publishable_files
from glm_quant.stages.quantize import QuantizeStage
from glm_quant.stages.upload import early_targets
from tests.card_records import EPYC

RECIPE = """\
name: gates
description: everything as it is
rules:
  - {group: mtp, drop: true}
  - {match: ".", dtype: source}
parity: {bounds: [{measure: mean_kl, max: 0.8}]}
divergence: {bounds: [{measure: mean_kl, max: 0.8}]}
evaluation: {bounds: [{measure: perplexity, max: 50}]}
publish:
  license: psf-2.0
"""
LICENSE = "3b2f81fe21d181c499c59a256c8e1968455d6689d269aa85373bfb6af41da3bf"
ACKNOWLEDGED = f"  acknowledge_license: {LICENSE}\n"


def opened(tmp_path: Path, recipe: str, *targets: str) -> Build:
    path = tmp_path / "gates.yaml"
    path.write_text(recipe)
    source, workspace = str(tiny_glm_path()), str(tmp_path / "work")
    return Build(BuildSpec(recipe=str(path), source=source, workspace=workspace, targets=targets))


def test_an_unproved_build_is_refused(tmp_path: Path) -> None:
    """Without a passing parity record nothing is published, not even to a folder."""
    target = tmp_path / "published"
    build = opened(tmp_path, RECIPE + ACKNOWLEDGED, str(target))
    judge_plan(build)
    with pytest.raises(PublishError, match="stage 'parity' has no passing record"):
        PublishStage(build, str(target)).run(lambda *_: None)
    assert not target.exists()


def test_a_licence_that_nobody_acknowledged_is_refused_first(tmp_path: Path) -> None:
    """Before anything is made, where there is a target; and again before publishing."""
    judge_plan(opened(tmp_path, RECIPE))
    build = opened(tmp_path, RECIPE, str(tmp_path / "published"))
    for refuse in (judge_plan, publishable_files):
        with pytest.raises(
            PublishError, match=r"gates\.yaml: publish: .*acknowledge_license: 3b2f"
        ):
            refuse(build)


def test_an_address_that_is_none_is_refused_first(tmp_path: Path) -> None:
    """A typing error costs seconds, not a conversion."""
    with pytest.raises(PublishError, match="hf://org/name"):
        judge_plan(opened(tmp_path, RECIPE + ACKNOWLEDGED, "hf://org"))


@pytest.fixture(scope="module")
def proved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished build; what would take minutes to measure is written down as if."""
    folder = tmp_path_factory.mktemp("proved")
    build = opened(folder, RECIPE + ACKNOWLEDGED)
    build.workspace.create()
    for stage in (DownloadStage(build), PlanStage(build), QuantizeStage(build, 0)):
        stage.run(lambda *_: None)
    AssembleStage(build).run(lambda *_: None)
    stages = ParityStage(build), DivergenceStage(build), EvaluationStage(build)
    for stage, made in zip(stages, (parity(), divergence(), evaluation()), strict=True):
        stage.keep(made.model_copy(update={"fingerprint": stage.fingerprint()}))
    (build.workspace.checkpoint / "README.md").write_text("the card")
    card = CardRecord(
        fingerprint=CardStage(build).fingerprint(),
        outputs=[FileDigest.of(build.workspace.checkpoint, "README.md")],
    )
    CardStage(build).keep(card)
    build.conversion.close()
    return folder


def parity() -> ParityStageRecord:
    found = ParityRecord(
        versions={},
        tokens=72,
        prompt="seeded",
        index_topk=64,
        layers=[],
        max_layer_error=1e-6,
        ties=0,
        logits=None,
        mean_kl=0.3,
        max_kl=4.0,
        top1_agreement=0.8,
        settings=ParitySettings(bounds=(Bound(measure="mean_kl", max=0.8),)),
    )
    return ParityStageRecord(fingerprint="", found=found)


def divergence(largest: float = 0.9) -> DivergenceRecord:
    kl = np.linspace(0.1, largest, 72)
    positions = Positions(kl, kl < 0.7, np.full(72, 1.25), np.full(72, 1.5))
    went = PassFacts(seconds=1, weight_bytes=1, planned_bytes=1, waves=1, mlx_peak_bytes=1)
    return DivergenceRecord(
        fingerprint="",
        reference="r",
        source="s",
        build="b",
        index_topk=64,
        slices=[],
        rows=make_rows(["code"], [72], positions, 64),
        reference_pass=went,
        build_pass=went,
        compare_seconds=1.0,
        versions={},
    )


def evaluation(perplexity: float = 20.1) -> EvaluationRecord:
    text = Perplexity(
        text="held out",
        text_sha256="0" * 64,
        tokens=64,
        scored_tokens=63,
        context=64,
        stride=32,
        windows=1,
        mean_nll=3.0,
        value=perplexity,
        standard_error=None,
        method="strided",
    )
    measured = Measurements(
        machine=EPYC,
        arithmetic="float32",
        versions={},
        load=Load(seconds=1.0, mlx_bytes=1),
        perplexity=[text],
        speed=[],
        needle=None,
        peak_rss_bytes=1,
        mlx_peak_bytes=1,
        seconds=1.0,
    )
    return EvaluationRecord(fingerprint="", measurements=measured)


def copy_of(proved: Path, tmp_path: Path) -> Build:
    """A build that may be broken, whose paths are not part of what is recorded."""
    shutil.copytree(proved / "work", tmp_path / "work")
    return opened(tmp_path, RECIPE + ACKNOWLEDGED)


def record(stage: Any, **values: Any) -> None:
    """Write a stage's record again with other values."""
    stage.keep(stage.current().model_copy(update=values))


def test_a_proved_build_may_be_published(proved: Path, tmp_path: Path) -> None:
    """With all that the next tests take away, there is no objection."""
    build = copy_of(proved, tmp_path)
    files = {file.path for file in publishable_files(build)}
    on_disk = {p.name for p in build.workspace.checkpoint.iterdir()}
    assert files == on_disk


@pytest.mark.parametrize("stage", ["assemble", "parity", "divergence", "evaluate", "card"])
def test_a_missing_record_is_refused_by_name(proved: Path, tmp_path: Path, stage: str) -> None:
    """Whatever else is there."""
    build = copy_of(proved, tmp_path)
    (build.workspace.records / f"{stage}.json").unlink()
    with pytest.raises(PublishError, match=f"stage '{stage}' (is not done|has no passing record)"):
        publishable_files(build)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        ("mean_kl", "bounds mean_kl, which was not measured"),
        ("top1_agreement", "parity: top-1 agreement is None: it was not measured"),
    ],
)
def test_a_number_that_was_not_measured_is_refused_by_name(
    proved: Path, tmp_path: Path, number: str, said: str
) -> None:
    """What a recipe may leave out while it is tried must be there in the end."""
    build = copy_of(proved, tmp_path)
    found = parity().found.model_copy(update={number: None})
    record(ParityStage(build), found=found)
    with pytest.raises(PublishError, match=said):
        publishable_files(build)


def test_a_record_cannot_hold_what_is_no_number(proved: Path, tmp_path: Path) -> None:
    """NaN has no form in JSON, so such a record is none."""
    build = copy_of(proved, tmp_path)
    found = parity().found.model_copy(update={"max_layer_error": math.nan})
    record(ParityStage(build), found=found)
    with pytest.raises(PublishError, match="stage 'parity' has no passing record"):
        publishable_files(build)


def test_no_perplexity_at_all_is_refused(proved: Path, tmp_path: Path) -> None:
    """A recipe may measure without a text; then there is nothing to publish on."""
    build = copy_of(proved, tmp_path)
    nothing = evaluation().measurements.model_copy(update={"perplexity": []})
    record(EvaluationStage(build), measurements=nothing)
    with pytest.raises(
        PublishError, match="evaluation: the recipe bounds perplexity, which was not"
    ):
        publishable_files(build)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "README.md"])
def test_an_output_that_changed_is_refused(proved: Path, tmp_path: Path, file: str) -> None:
    """One bit of a shard, of a small file, of the card: found before anything goes out."""
    build = copy_of(proved, tmp_path)
    [path] = build.workspace.checkpoint.glob(file.replace("model.", "model*."))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=path.name):
        publishable_files(build)


@pytest.mark.parametrize("stage", [ParityStage, DivergenceStage, EvaluationStage])
def test_a_broken_bound_is_refused_though_the_record_is_there(
    proved: Path, tmp_path: Path, stage: Any
) -> None:
    """The numbers are held to the bounds once more, whoever wrote the record."""
    build = copy_of(proved, tmp_path)
    if stage is ParityStage:
        record(stage(build), found=parity().found.model_copy(update={"mean_kl": 0.9}))
    elif stage is DivergenceStage:
        record(stage(build), rows=divergence(2.0).rows)
    else:
        record(stage(build), measurements=evaluation(99.0).measurements)
    with pytest.raises(PublishError, match=r"a bound of the recipe is broken: .*(kl|perplexity)"):
        publishable_files(build)


def test_a_word_is_about_the_bytes_that_were_asked_about(proved: Path, tmp_path: Path) -> None:
    """Other bytes are another question, whatever was said before; questions are counted."""
    workspace = copy_of(proved, tmp_path).workspace
    give_word(workspace, approved=False, note="", asked=2)
    give_word(workspace, approved=True, note="")
    said = last_word(workspace)
    assert said is not None
    assert (said.approved, said.asked) == (True, 3)
    before, manifest = identity(workspace), workspace.checkpoint / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    assert last_word(workspace) is None
    assert identity(workspace) != before


def test_shards_go_early_where_that_pays(tmp_path: Path) -> None:
    """To what is far away; to a folder only where the local copy is to go."""
    targets = ("hf://org/name", "s3://bucket/prefix", str(tmp_path / "published"))
    assert early_targets(opened(tmp_path, RECIPE, *targets)) == targets[:2]
    let_go = f"{RECIPE}  keep_local: false\n"
    assert early_targets(opened(tmp_path, let_go, *targets)) == targets


def test_a_build_whose_shards_are_let_go_needs_less_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is planned for: the shards that fill together, and one that is being uploaded."""
    recipe = RECIPE.replace("rules:", "shard_bytes: 100_000\nrules:")
    conversion = opened(tmp_path, recipe, str(tmp_path / "published")).conversion
    asked: list[int] = []
    monkeypatch.setattr(
        "glm_quant.quantize.convert.require_space", lambda _, needed, __: asked.append(needed)
    )
    for let_go in (False, True):
        conversion.check_space(let_go)
    sizes = sorted(shard.size_bytes for shard in conversion.plan.shards)
    open_at_once = conversion.outputs.most_open
    assert asked == [sum(sizes), sum(sizes[-open_at_once - 1 :])]
    assert open_at_once + 1 < len(sizes)
