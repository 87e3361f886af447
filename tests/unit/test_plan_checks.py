"""What a second would have shown is said before hours are spent, by `plan` and `run` alike."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from glm_quant.build import Build, BuildSpec
from glm_quant.data import tiny_glm_path
from glm_quant.errors import GlmQuantError
from glm_quant.plan_checks import checks_table, judge_plan

ROOT = Path(__file__).parents[2]
RULES = """\
name: mine
description: as it is
rules:
  - {group: mtp, drop: true}
  - {match: lm_head, bits: 4, quantizer: gptq}
  - {match: ".", dtype: source}
calibration: {tokens: 64, context: 64}
divergence: {tokens: 72, context: 72}
parity: {tokens: 72}
"""


def write_recipe(folder: Path, **sections: str) -> str:
    """Write a recipe that passes every check but for the sections that are given."""
    lines = [line for line in RULES.splitlines() if line.partition(":")[0] not in sections]
    text = "\n".join([*lines, *(f"{name}: {value}" for name, value in sections.items())])
    path = folder / "mine.yaml"
    path.write_text(text + "\n")
    return str(path)


def plan(recipe: str, source: Path) -> tuple[int, str]:
    """`glm-quant plan`: its exit code, and all that it printed on one line."""
    done = CliRunner().invoke(app, ["plan", "--source", str(source), "--recipe", recipe])
    return done.exit_code, " ".join(done.output.split())


def test_list_and_checks_are_one() -> None:
    """`docs/plan-checks.md` has every check with its sentence, and no other."""
    assert checks_table() in (ROOT / "docs" / "plan-checks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parity": "{tokens: 64}"}, "parity.tokens is 64 and index_topk is 64"),
        ({"parity": "{tokens: 72, layers: [5]}"}, "parity.layers names layers outside 0 to 4"),
        (
            {"parity": "{tokens: 72, layers: [1], bounds: [{measure: mean_kl, max: 1}]}"},
            "parity bounds mean_kl, which is known after layer 4; parity.layers ends at 1",
        ),
        ({"parity": "{tokens: 5000}"}, "parity.tokens is 5,000, and the model's max_position_emb"),
        (
            {"divergence": "{tokens: 8192, context: 8192}"},
            "divergence.context is 8,192, and the model's max_position_embeddings 4,096",
        ),
        (
            {"calibration": "{tokens: 8192, context: 8192}"},
            "calibration.context is 8,192, and the model's max_position_embeddings 4,096",
        ),
        (
            {"evaluation": "{needle_lengths: [16384]}"},
            "evaluation.needle_lengths, with thinking is 16,384",
        ),
        ({"evaluation": "{needle_lengths: [8]}"}, "a needle prompt of 8 tokens cannot hold its"),
        ({"evaluation": "{needle_lengths: [128], needle_depths: [2]}"}, "depth is 2.0; it must"),
        ({"evaluation": "{perplexity_text: SHORT}"}, "short.txt: the text has 7 tokens, eval"),
        ({"evaluation": "{perplexity_text: none.txt}"}, "none.txt: the recipe's perplexity_text"),
        ({"evaluation": "{harness: {files: {piqa: none.jsonl}}}"}, "data file for piqa is not"),
        ({"divergence": "{texts: {a: EMPTY}}"}, "divergence.texts.a has 0 tokens"),
        (
            {"calibration": "{texts: {a: SHORT}}"},
            "the calibration's texts have 7 tokens, not one sequence of calibration.context",
        ),
        (
            {"calibration": "{texts: {a: LONG}, tokens: 64, context: 64}",
             "divergence": "{texts: {b: LONG}, tokens: 72, context: 72}"},
            "calibration.texts.a is the same text as divergence.texts.b",
        ),
        ({"baselines": "{golden: nowhere}"}, "baseline 'golden' is no workspace"),
        ({"publish": "{targets: ['hf://org']}"}, "hf://org/name"),
        ({"publish": "{targets: ['s3://bucket/prefix']}"}, "acknowledge_license"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_by_plan_and_run(
    tmp_path: Path, sections: dict[str, str], message: str
) -> None:
    """Both say the same sentence, before anything is made."""
    texts = {"SHORT": "Some words.", "EMPTY": "", "LONG": "def f(x):\n    return x\n" * 99}
    for name, text in texts.items():
        path = tmp_path / f"{name.lower()}.txt"
        path.write_text(text)
        sections = {key: value.replace(name, str(path)) for key, value in sections.items()}
    recipe = write_recipe(tmp_path, **sections)
    code, output = plan(recipe, tiny_glm_path())
    assert code
    assert message in output
    spec = BuildSpec(
        recipe=recipe, source=str(tiny_glm_path()), workspace=str(tmp_path / "workspace")
    )
    with pytest.raises(GlmQuantError) as refused:
        judge_plan(Build(spec))
    assert message in " ".join(str(refused.value).split())


def test_a_recipe_that_fits_passes_with_warnings(tmp_path: Path) -> None:
    """Few tokens for an expert are said, and do not stop anybody."""
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 99)
    calibration = f"{{texts: {{a: {text}}}, tokens: 128, context: 64}}"
    code, output = plan(write_recipe(tmp_path, calibration=calibration), tiny_glm_path())
    assert code == 0
    assert "an expert meets 21 tokens of the calibration on average; below 32" in output


def test_a_source_without_a_tokenizer_is_refused_where_it_is_evaluated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`run` would evaluate; `convert` converts and warns that nobody can prompt the build."""
    source = tmp_path / "source"
    shutil.copytree(tiny_glm_path(), source)
    (source / "tokenizer.json").unlink()
    rules = RULES.replace(", quantizer: gptq", "").replace("calibration", "# calibration")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(rules)
    code, output = plan(str(recipe), source)
    assert code == 2
    assert "there is no tokenizer.json, so nobody can prompt the build" in output
    places = ["--source", str(source), "--recipe", str(recipe), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["convert", *places])
    assert done.exit_code == 0, done.output
    assert "there is no tokenizer.json, so nobody can prompt the build" in caplog.text
