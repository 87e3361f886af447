"""`fit`: within the budget, the optimum of its numbers, a recipe that plans to its bytes."""

import json
import re
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_quant.build import Build, BuildSpec, claimed
from glm_quant.calibration.calibrate import calibrate
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.checkpoint.source import FolderSource
from glm_quant.codes.scheme import Quantized
from glm_quant.convert import open_conversion
from glm_quant.data import tiny_glm_path
from glm_quant.errors import InputError, OutputError, RecipeError
from glm_quant.evaluation.token_set import TokenSet, make_token_set
from glm_quant.fit.command import FitSettings, _Fit, fit, parse_floors, parse_measure
from glm_quant.fit.parts import divide
from glm_quant.fit.sensitivity import (
    DivergenceMeter,
    ErrorMeter,
    Meter,
    ScaledMeter,
    Trial,
    measure_costs,
)
from glm_quant.fit.solve import Front, Option
from glm_quant.fit.target import parse_target
from glm_quant.fit.text import fit_tokens
from glm_quant.fit.trial import TrialWeights
from glm_quant.model.geometry import Geometry
from glm_quant.model.groups import GROUPS
from glm_quant.quantize.plan import make_plan
from glm_quant.recipe import DivergenceSettings, load_recipe, parse_recipe
from glm_quant.report.memory import machine_bytes, memory_need, reserved_bytes
from glm_quant.stages.calibrate import CalibrateStage
from glm_quant.streaming.weights import BuildWeights
from tests.conftest import Made
from tests.plain import PLAIN
from tests.synthetic import small_config

OPTIONS = st.lists(
    st.lists(
        st.builds(Option, st.integers(1, 60), st.floats(0, 10, allow_nan=False)),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=5,
)


@given(OPTIONS, st.integers(0, 320))
def test_best_is_that_of_all_choices(parts: list[list[Option]], budget: int) -> None:
    """The cost is the least of every choice within the budget, and the budget is kept."""
    every = [
        (sum(o.size_bytes for o in choice), sum(o.cost for o in choice))
        for choice in product(*parts)
    ]
    within = [cost for size, cost in every if size <= budget]
    best = Front(parts).best(budget)
    if best is None:
        assert not within
        return
    assert best.size_bytes <= budget
    assert best.cost == pytest.approx(min(within), rel=1e-9, abs=1e-9)
    picked = [options[i] for options, i in zip(parts, best.picks, strict=True)]
    assert best.size_bytes == sum(option.size_bytes for option in picked)
    assert best.cost == pytest.approx(sum(option.cost for option in picked))


def test_thinned_front_keeps_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """A front that was thinned has far fewer points, and costs within the factor that it names."""
    rng = np.random.default_rng(0)
    parts = [
        [
            Option(int(size), float(cost))
            for size, cost in zip(
                np.sort(rng.integers(1, 1 << 20, 4)), -np.sort(-rng.exponential(1, 4)), strict=True
            )
        ]
        for _ in range(9)
    ]
    whole = Front(parts)
    monkeypatch.setattr("glm_quant.fit.solve._MOST_POINTS", 16)
    monkeypatch.setattr("glm_quant.fit.solve._THINNING", 0.05)
    thin = Front(parts)
    assert whole.slack == 1 < thin.slack
    assert len(thin.sizes) < len(whole.sizes) / 2
    for size in np.linspace(whole.sizes[0], whole.sizes[-1], 50):
        exact, near = whole.best(int(size)), thin.best(int(size))
        assert exact
        assert near
        assert near.size_bytes <= size
        assert exact.cost <= near.cost <= exact.cost * thin.slack


def test_targets(release: Path) -> None:
    """Files count 10⁹, bits per weight count tensors, a machine has 2³⁰ less system and caches."""
    geometry = Geometry.from_config(json.loads((release / "config.json").read_text()))
    assert parse_target("238GB", geometry, 1).size_bytes == 238 * 10**9
    assert parse_target("238 gb", geometry, 1).headers
    assert parse_target("2.56bpw", geometry, 1000).size_bytes == 320
    mac = parse_target("256GB Mac at 32K context", geometry, 1)
    cache = memory_need(geometry, 0, 32 << 10).total_bytes
    assert mac.size_bytes == machine_bytes(256) - reserved_bytes() - cache
    with pytest.raises(RecipeError, match="nothing is left for weights"):
        parse_target("8GB Mac at 8K", geometry, 1)
    with pytest.raises(RecipeError, match=r"--target small: this is no target\. Give a size"):
        parse_target("small", geometry, 1)


class Seen:
    """Notes which stages begin, and that none moves back."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.share = 0.0

    def begin(self, stage: str) -> None:
        self.stages.append(stage)
        self.share = 0.0

    def move(self, stage: str, done: int, total: int) -> None:
        assert stage == self.stages[-1]
        assert self.share <= done / total <= 1
        self.share = done / total


def no_tokens() -> TokenSet:
    """Tokens of a fit that must not begin to measure."""
    raise AssertionError("nothing is to be measured")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace for the costs, which all fits of a file share."""
    return tmp_path_factory.mktemp("costs") / "work"


def fitted(source: Path, output: Path, target: str, *floors: str, work: Path) -> str:
    """Fit; return what the recipe file says."""
    settings = FitSettings(PLAIN, parse_floors(floors), 2, "scaled", workspace=work)
    opened = Checkpoint.open(source)
    tokens = DivergenceSettings(tokens=32, context=32)
    result = fit(opened, target, output, settings, lambda: make_token_set(opened, tokens), Seen())
    assert result.output == output
    return output.read_text()


def test_recipe_plans_to_the_bytes_it_names(small: Path, tmp_path: Path, work: Path) -> None:
    """The file reads as a recipe whose plan has the bytes of its comment, within the budget."""
    text = fitted(small, tmp_path / "mine.yaml", "6.5bpw", work=work)
    plan = make_plan(Checkpoint.open(small), load_recipe(tmp_path / "mine.yaml"))
    said = re.search(r"plans to ([\d,]+) bytes of tensors and ([\d,]+) of files", text)
    assert said
    assert int(said[1].replace(",", "")) == plan.tensor_bytes
    assert int(said[2].replace(",", "")) == sum(shard.size_bytes for shard in plan.shards)
    assert plan.bits_per_weight <= 6.5
    assert "for a target of 6.5bpw" in text
    assert "No other choice within the budget has a lower sum" in text


def test_costs_do_not_hang_on_the_code() -> None:
    """What is measured on unasked is a text that ships, the same after any edit of a module."""
    tokens = fit_tokens(Checkpoint.open(tiny_glm_path()), None, 4096, 512)
    assert sum(map(len, tokens.sequences)) == 4096
    assert tokens.sha256.startswith("a82c286eed1a5bea")


def costs_of(meter: Meter, trials: list[Trial], steps: list[float] | None = None) -> list[float]:
    """Measure, nothing recorded; `steps` gets the shares that progress tells."""
    shares = [] if steps is None else steps
    return list(meter.costs(trials, lambda done, total: shares.append(done / total)))


def one_part(path: Path, part: str, **settings: object) -> str:
    """Write a recipe that leaves one group to fit; return its path."""
    groups = [group for group in GROUPS if group not in (part, "mtp")]
    rules = [
        {"group": "mtp", "drop": True},
        {"group": groups, "dtype": "source"},
        {"group": part, "bits": 4, "group_size": 64},
    ]
    recipe = {"name": "one", "description": "one part to fit", "rules": rules, **settings}
    path.write_text(json.dumps(recipe))
    return str(path)


def test_large_sources_are_streamed_in_one_scheme_a_part(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unasked, a large source in a folder is measured by `scaled`; one elsewhere is not begun."""
    monkeypatch.setattr("glm_quant.fit.command._KL_BYTES", 0)
    settings = FitSettings(one_part(tmp_path / "one.yaml", "lm_head"), {}, bands=1)
    source = Checkpoint.open(small)
    fit(
        source,
        "16bpw",
        tmp_path / "mine.yaml",
        settings,
        lambda: make_token_set(source, DivergenceSettings(tokens=64, context=32)),
        Seen(),
    )
    text = (tmp_path / "mine.yaml").read_text()
    assert "in one scheme; others by the error of some rows" in text

    class Remote(FolderSource):
        places = 2

    remote = Checkpoint.open(Remote(small))
    with pytest.raises(InputError, match=r"over the network.*Fetch it into a folder first"):
        fit(remote, "16bpw", tmp_path / "b.yaml", settings, no_tokens, Seen())


def test_what_is_measured_is_what_the_recipe_makes(small: Path, tmp_path: Path) -> None:
    """A recipe that wants a calibration is measured with one, and says it: `convert` makes it too.

    It has the bits of the trials and what they were calibrated with, in the bytes that it names.
    """
    calibration = {"tokens": 64, "context": 32}
    base = one_part(tmp_path / "b.yaml", "dense_mlp", quantizer="gptq", calibration=calibration)
    source, output, seen = Checkpoint.open(small), tmp_path / "mine.yaml", Seen()
    tokens = make_token_set(source, DivergenceSettings(tokens=32, context=32))
    work = tmp_path / "work"
    settings = FitSettings(base, {}, bands=1, measure="scaled", workspace=work)
    result = fit(source, "15.7bpw", output, settings, lambda: tokens, seen)
    assert seen.stages == ["calibrate", "measure"]
    assert "imatrix" not in output.read_text()
    build = open_conversion(small, str(output), tmp_path / "build")
    with claimed(build.spec):
        CalibrateStage(build, with_reference=False).run(lambda *_: None)
    plan = build.plan
    assert (plan.tensor_bytes, plan.bits_per_weight) == (
        result.tensor_bytes,
        result.bits_per_weight,
    )
    (part,) = divide(plan, load_recipe(output), 1, {})
    imatrix = work / "calibration" / "imatrix"
    (tried,) = divide(make_plan(source, load_recipe(output), imatrix), load_recipe(output), 1, {})
    assert all(one.factor is not None for one in part.weights)
    assert [one.describe() for one in part.weights] == [one.describe() for one in tried.weights]
    # A run in the workspace, and fits to other targets, have the calibration already.
    assert not Build(
        BuildSpec(recipe=str(output), source=str(small), workspace=str(work))
    ).plan.uncalibrated
    known = sorted(work.glob("records/cost-*"))
    fit(source, "15.6bpw", tmp_path / "other.yaml", settings, lambda: tokens, seen)
    assert seen.stages == ["calibrate", "measure", "measure"]
    assert sorted(work.glob("records/cost-*")) == known


def test_an_imatrix_takes_the_place_of_a_calibration(small: Path, tmp_path: Path) -> None:
    """A recipe with `calibration` is fitted to an imatrix that is named, and reads back."""
    source = Checkpoint.open(small)
    batch = make_token_set(source, DivergenceSettings(tokens=64, context=32))
    calibrate(source, batch, tmp_path / "imatrix")
    base = one_part(tmp_path / "b.yaml", "dense_mlp", quantizer="search", calibration={})
    settings = FitSettings(base, {}, 1, "scaled", str(tmp_path / "imatrix"))
    fit(source, "15.7bpw", tmp_path / "mine.yaml", settings, lambda: batch, Seen())
    made = load_recipe(tmp_path / "mine.yaml")
    assert (made.imatrix, made.calibration) == (str(tmp_path / "imatrix"), None)


def test_trials_share_the_reading_of_the_source(small: Path, tmp_path: Path) -> None:
    """Together they cost what each does alone, and no expert is read twice for them."""
    reads = Counter[tuple[str, int]]()

    class Counting(FolderSource):
        def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
            reads[name, begin] += 1
            return super().read(name, begin, end)

    recipe = load_recipe(PLAIN)
    source = Checkpoint.open(Counting(small))
    parts = divide(make_plan(source, recipe), recipe, 2, {})
    experts = {
        (info.shard, info.begin) for name, info in source.tensors.items() if ".experts." in name
    }
    trials = [Trial(part, part.schemes[0]) for part in parts]
    tokens = make_token_set(source, DivergenceSettings(tokens=64, context=32))
    steps: list[float] = []
    together = costs_of(DivergenceMeter(source, tokens, tmp_path / "a"), trials, steps)
    # A layer of many trials takes minutes, so progress moves within it.
    assert len(set(steps)) > 4 * small_config()["num_hidden_layers"]
    assert steps == sorted(steps)
    assert steps[-1] == 1
    assert len(trials) > 5
    assert max(reads[place] for place in experts) == 1
    meter = DivergenceMeter(source, tokens, tmp_path / "b")
    alone = [cost for trial in trials for cost in costs_of(meter, [trial])]
    assert alone == together
    assert max(reads[place] for place in experts) > len(trials)


def test_size_includes_headers(small: Path, tmp_path: Path, work: Path) -> None:
    """A target in bytes holds whole files: a byte less than a fit's gives another fit."""
    source = Checkpoint.open(small)
    sizes: list[int] = []
    for name, target in (("a.yaml", "1.8MB"), ("b.yaml", "")):
        fitted(small, tmp_path / name, target or f"{(sizes[0] - 1) / 1000:.3f}KB", work=work)
        plan = make_plan(source, load_recipe(tmp_path / name))
        sizes.append(sum(shard.size_bytes for shard in plan.shards))
    assert sizes[1] < sizes[0] <= 1_800_000


def test_floors_are_kept(small: Path, tmp_path: Path, work: Path) -> None:
    """No weight of the group has fewer bits, and what another fit measured is not again."""
    fitted(small, tmp_path / "first.yaml", "6.5bpw", work=work)
    records = list((work / "records").glob("cost-*"))
    stamps = {path: path.stat().st_mtime_ns for path in records}
    fitted(small, tmp_path / "a.yaml", "6.5bpw", "attention=6", "lm_head=4", work=work)
    assert {path: path.stat().st_mtime_ns for path in records} == stamps
    least = {"attention": 6, "lm_head": 4}
    plan = make_plan(Checkpoint.open(small), load_recipe(tmp_path / "a.yaml"))
    bits = [
        (one.scheme.bits, least[one.weight.group])
        for one in plan.weights
        if isinstance(one.scheme, Quantized) and one.weight.group in least
    ]
    assert bits
    assert all(has >= needs for has, needs in bits)


def test_bad_input_is_said_before_anything_is_read(small: Path, tmp_path: Path) -> None:
    """Impossible targets, floors of what is not fitted, words that mean nothing, a file there."""
    work = tmp_path / "work"
    with pytest.raises(RecipeError, match=r"the smallest build has [\d,]+ bytes of tensors"):
        fitted(small, tmp_path / "a.yaml", "1bpw", work=work)
    with pytest.raises(RecipeError, match="--floor router has nothing to hold"):
        fitted(small, tmp_path / "a.yaml", "4bpw", "router=8", work=work)
    with pytest.raises(RecipeError, match=r"--floor attention: give group=bits"):
        parse_floors(["attention"])
    with pytest.raises(RecipeError, match="no scheme has at least 9 bits"):
        fitted(small, tmp_path / "a.yaml", "4bpw", "attention=9", work=work)
    with pytest.raises(RecipeError, match=r"--measure error: give one of kl, scaled\."):
        parse_measure("error")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.yaml").write_text("mine")
    with pytest.raises(OutputError, match="there already"):
        fitted(small, tmp_path / "a.yaml", "4bpw", work=work)


def test_rules_of_the_recipe_stay(small: Path) -> None:
    """Patterns keep their weights and their place; groups with a dtype are not fitted."""
    recipe = parse_recipe(
        "name: r\ndescription: d\nrules:\n"
        "  - {match: embed_q$, bits: 8}\n"
        "  - {group: [attention, routed_experts], bits: 4}\n"
        "  - {group: mtp, drop: true}\n"
        "  - {match: '.*', dtype: source}\n",
        "r.yaml",
    )
    parts = divide(make_plan(Checkpoint.open(small), recipe), recipe, 1, {})
    assert {part.kind.group for part in parts} == {"attention", "routed_experts"}
    paths = {one.weight.path for part in parts for one in part.weights}
    assert not any(path.endswith("embed_q") for path in paths)
    assert any(path.endswith("unembed_out") for path in paths)


def test_trial_has_the_values_of_the_build(made: Made) -> None:
    """Every weight of a trial, experts and heads too, is exactly what the build stands for."""
    planned = {p.weight.path: p for p in made.plan.weights if isinstance(p.scheme, Quantized)}
    trial = TrialWeights(made.checkpoint, planned)
    build = BuildWeights(made.output)
    compared = 0
    for layer in (0, made.plan.geometry.num_hidden_layers - 1):  # dense, sparse
        prefix = f"model.layers.{layer}."
        ours = trial.values(prefix, [])
        for name, value in build.values(prefix, list(ours)).items():
            if f"{prefix}{name}".removesuffix(".weight") in planned:
                np.testing.assert_array_equal(np.array(ours[name]), np.array(value))
                compared += 1
        if trial.args.sparse_layers[layer]:
            for mine, theirs in zip(
                trial.experts(layer, [1, 3]), build.experts(layer, [1, 3]), strict=True
            ):
                for a, b in zip(mine[1], theirs[1], strict=True):
                    np.testing.assert_array_equal(np.array(a), np.array(b))
                    compared += 1
    np.testing.assert_array_equal(np.array(trial.head(5, 9)), np.array(build.head(5, 9)))
    assert compared > 12


def test_more_bits_cost_less(small: Path, tmp_path: Path) -> None:
    """By all measures; `scaled` is `kl` where it was streamed; what was tried does not stay."""
    source = Checkpoint.open(small)
    recipe = load_recipe(PLAIN)
    parts = divide(make_plan(source, recipe), recipe, 1, {})
    part = next(part for part in parts if part.kind.title == "routed_experts down")
    wanted = [
        scheme
        for scheme in part.schemes
        if (scheme.bits, scheme.group_size) in ((2, 32), (4, 64), (8, 64))
    ]
    tokens = make_token_set(source, DivergenceSettings(tokens=64, context=32))
    error, kl = ErrorMeter(source), DivergenceMeter(source, tokens, tmp_path)
    for meter in (error, kl):
        costs = costs_of(meter, [Trial(part, scheme) for scheme in wanted])
        assert costs == sorted(costs, reverse=True)
        assert costs[0] > 10 * costs[-1] > 0
    (scaled,) = measure_costs(
        ScaledMeter(kl, error), [part], tmp_path / "records", lambda _done, _total: None
    )
    by_size = sorted(zip(part.schemes, scaled, strict=True), key=lambda pair: pair[0].bits)
    assert by_size[0][1] > 10 * by_size[-1][1] > 0
    middle = Trial(part, part.schemes[len(part.schemes) // 2])
    assert scaled[len(part.schemes) // 2] == pytest.approx(costs_of(kl, [middle])[0])
    assert not list(tmp_path.glob("trial-*"))


def test_real_targets_are_kept(release: Path, tmp_path: Path) -> None:
    """For GLM-5.2: what is written plans to nearly all of a budget, and to no byte more."""
    source, base = Checkpoint.open(release), load_recipe("dynamic-2.56bpw")
    plan = make_plan(source, base)
    parts = divide(plan, base, 4, parse_floors(["attention=5"]))
    costs = [[float(p.size_bytes(s)) * 4.0**-s.bits for s in p.schemes] for p in parts]
    for target in ("238GB", "256GB Mac at 32K context"):
        budget = parse_target(target, plan.geometry, plan.params)
        output = tmp_path / f"{budget.size_bytes}.yaml"
        result = _Fit(source, base, plan, parts, costs, budget, "supposed").write(output)
        used = result.file_bytes if budget.headers else result.tensor_bytes
        assert budget.size_bytes * 0.999 < used <= budget.size_bytes
        again = make_plan(source, load_recipe(output))
        assert sum(shard.size_bytes for shard in again.shards) == result.file_bytes
