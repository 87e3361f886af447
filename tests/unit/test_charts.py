"""Charts: files that depend on the data alone, and words that say what they show."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.evaluation.records import Needle, NeedleTrial
from glm_quant.model.geometry import Geometry
from glm_quant.quantize.plan import Plan, make_plan
from glm_quant.recipe import load_recipe
from glm_quant.report.charts import DARK, LIGHT, Chart, Theme, render
from glm_quant.report.memory import memory_needs
from glm_quant.report.quality_charts import Point, bits_chart, layers_chart, needle_chart
from glm_quant.report.size_charts import footprint_chart, memory_chart, recipe_chart
from tests.synthetic import small_config


@pytest.fixture(scope="module")
def plan(release: Path) -> Plan:
    """Give the plan of the 2.56 bpw build of GLM-5.2."""
    return make_plan(Checkpoint.open(release), load_recipe("dynamic-2.56bpw"))


@pytest.fixture(scope="module")
def shown(plan: Plan) -> dict[str, Chart]:
    """Give every chart, with the release's real figures."""
    trials = [
        NeedleTrial(
            length=length,
            depth=depth,
            prompt_tokens=length,
            phrasing=0,
            expected="1",
            reply="1",
            retrieved=length < 4096 or depth > 0.5,
        )
        for length in (1024, 8192)
        for depth in (0.1, 0.9)
    ]
    made = (
        recipe_chart(plan.groups()),
        footprint_chart("This build", plan.tensor_bytes, [("another", 3.6e11)]),
        memory_chart(memory_needs(plan.geometry, plan.tensor_bytes, 1 << 20)),
        needle_chart(Needle(text_sha256="0", method="m", trials=trials)),
    )
    own = Point("this build", 2.56, 0.31, "2.56 bpw · 0.3100")
    four = Point("uniform 4 bits", 4.5, 0.02, "4.50 bpw · 0.0200")
    bits = bits_chart("KL by bits", ("bits per weight", "mean KL"), own, [four])
    made = (*made, layers_chart([0.1, 0.15, 0.3, 0.25]), bits)
    return {chart.name: chart for chart in made}


@pytest.mark.parametrize(
    ("name", "theme"),
    [
        ("recipe", LIGHT),
        ("memory", DARK),
        ("footprint", DARK),
        ("needle", DARK),
        ("layers", LIGHT),
        ("bits", DARK),
    ],
)
def test_chart_is_the_same_bytes_each_time(
    shown: dict[str, Chart], name: str, theme: Theme, tmp_path: Path
) -> None:
    """Two renderings are equal, 1,400 pixels wide, on the theme's paper, and not empty."""
    first = render(shown[name], theme, tmp_path / "a").read_bytes()
    file = render(shown[name], theme, tmp_path / "b")
    assert file.read_bytes() == first
    pixels = imread(file)
    assert pixels.shape[1] == 1400
    paper = [int(theme.paper[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    assert np.allclose(pixels[0, 0, :3], paper, atol=1 / 255)
    inked = np.abs(pixels[..., :3] - paper).max(axis=-1) > 0.2
    assert 0.02 < inked.mean() < 0.9


@pytest.mark.parametrize("name", ["recipe", "footprint", "memory", "needle", "layers", "bits"])
def test_nothing_is_cut_at_the_edges(shown: dict[str, Chart], name: str, tmp_path: Path) -> None:
    """The outermost pixels are paper: no text or bar runs off the picture."""
    pixels = imread(render(shown[name], LIGHT, tmp_path))[..., :3]
    edges = (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:])
    assert all(np.all(edge > 0.99) for edge in edges)


def test_themes_have_files_of_their_own(shown: dict[str, Chart]) -> None:
    """Light is the plain name, since the card shows it where a page has no theme."""
    assert shown["recipe"].file(LIGHT) == "recipe.png"
    assert shown["recipe"].file(DARK) == "recipe-dark.png"


def test_alt_text_of_the_recipe_has_each_groups_share(shown: dict[str, Chart]) -> None:
    """97.5 % of parameters and 95.2 % of bytes are the experts'."""
    alt = shown["recipe"].alt
    assert "Routed experts 2-bit g64 gptq, 97.5 % of parameters and 95.2 % of bytes" in alt
    assert alt.count(" of bytes") == 9


def test_alt_text_of_the_footprint_names_the_machine(shown: dict[str, Chart]) -> None:
    """237.9 GB need a machine with 256 GB."""
    assert "this build is 237.9 GB (the smallest machine that holds it has 256 GB)" in (
        shown["footprint"].alt
    )
    assert "another 360.0 GB" in shown["footprint"].alt


def test_alt_text_of_memory_has_every_context(shown: dict[str, Chart]) -> None:
    """The same figures as the card's table, and what a machine has left."""
    alt = shown["memory"].alt
    assert "8K tokens: 240.0 GB (34.92 GB left of 256 GB, with 8-bit caches 239.6 GB)" in alt
    assert "1M tokens: 340.6 GB (209.2 GB left of 512 GB, with 8-bit caches 293.8 GB)" in alt


def test_a_small_model_is_not_set_against_machines() -> None:
    """Any machine holds it: what is left of one would say nothing."""
    needs = memory_needs(Geometry.from_config(small_config()), 3_000_000, 4096)
    assert "left of" not in memory_chart(needs).alt
    assert "with 8-bit" not in memory_chart(needs).alt


def test_alt_text_of_bits_has_every_build_in_order(shown: dict[str, Chart]) -> None:
    """Only measured points, by their bits."""
    assert shown["bits"].alt == (
        "KL by bits: this build 2.56 bpw · 0.3100, uniform 4 bits 4.50 bpw · 0.0200"
    )


def test_alt_text_of_the_needle_has_every_length(shown: dict[str, Chart]) -> None:
    """Means over the depths."""
    assert "1,024 tokens 100%, 8,192 tokens 50%" in shown["needle"].alt


def test_alt_text_of_the_layers_has_first_last_and_largest(shown: dict[str, Chart]) -> None:
    """The largest need not be the last."""
    assert "0.100 after layer 0, 0.250 after layer 3, largest 0.300 after layer 2" in (
        shown["layers"].alt
    )
