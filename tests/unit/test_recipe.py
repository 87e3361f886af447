"""Recipes: those that ship are sound; every mistake is an error with file and line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import RecipeError
from glm_quant.quantize.plan import make_plan
from glm_quant.recipe import load_recipe, parse_recipe, recipe_names
from tests.synthetic import small_config

HEAD = "name: mine\ndescription: a test\nrules:\n"
REST = """\
  - group: [routed_experts, shared_experts, dense_mlp, attention, embeddings, lm_head]
    bits: 4
  - group: [indexer, router, norms]
    dtype: source
  - group: mtp
    drop: true
"""


def test_shipped_recipes() -> None:
    """The recipes that the documentation names are there and can be read."""
    names = recipe_names()
    assert {"demo", "dynamic-2.56bpw", "dynamic-3.5bpw", "uniform-4bit"} <= set(names)
    for name in names:
        assert load_recipe(name).name == name


def test_rule_knows_its_line() -> None:
    """A rule's place is its first line in the file."""
    recipe = parse_recipe(HEAD + REST, "mine.yaml")
    assert [recipe.where(rule) for rule in recipe.rules] == [
        "mine.yaml:4",
        "mine.yaml:6",
        "mine.yaml:8",
    ]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("name: [", 1, "this is not YAML"),
        ("a: b: c", 1, "this is not YAML"),
        ("name: x\n\tdescription: y\n", 2, "this is not YAML"),
        ("name: 2026-13-45\n", 1, "this is not YAML"),
        ("[" * 500, 1, "this is not YAML"),
        ("name: !!python/object/apply:os.system [ls]\n", 1, "this is not YAML"),
        ("", 1, "a recipe is a mapping"),
        ("- a\n", 1, "a recipe is a mapping"),
        ("name: x\n", 1, "description: Field required"),
        ("name: x\ndescription: y\nrules: 5\n", 3, "rules: Input should be a valid tuple"),
        ("name: x\ndescription: y\nrules: []\n", 3, "rules: "),
        ("name: a/b\ndescription: y\nrules: []\n", 1, "name: String should match pattern"),
        (HEAD + REST + "colour: red\n", 10, "colour: Extra inputs are not permitted"),
        (HEAD + REST + "1: red\n", 1, "Keys should be strings"),
        (HEAD + REST + "shard_bytes: 1000\n", 10, "greater than or equal to 65536"),
        (HEAD + REST + "parity:\n  token: 3\n", 11, "parity.token: Extra inputs"),
        (
            HEAD + REST + "parity:\n  max_mean_kl: 0.8\n",
            11,
            "under `bounds:`, in place of `max_mean_kl: 0.8`: - {measure: mean_kl, max: 0.8}",
        ),
        (
            HEAD + REST + "parity:\n  seed: 1\n  min_top1_agreement: 0.7\n",
            12,
            "in place of `min_top1_agreement: 0.7`: - {measure: top1_agreement, min: 0.7}",
        ),
        (
            HEAD + REST + "divergence: {max_perplexity_ratio: 1.05}\n",
            10,
            "- {measure: nll_difference, max: 0.0487902}",
        ),
        (
            HEAD + REST + "evaluation: {max_perplexity: 5, perplexity_texts: {wiki: a.txt}}\n",
            10,
            "- {measure: perplexity, max: 5}; - {measure: perplexity/wiki, max: 5}",
        ),
        (
            HEAD + REST + "evaluation: {min_needle_score: 0.75}\n",
            10,
            "- {measure: needle, min: 0.75}",
        ),
        (
            HEAD + REST + "parity: {bounds: [{measure: kl, max: 1}]}\n",
            10,
            "a bound is on 'kl', which is not measured here; there is layer_error, logit_error",
        ),
        (
            HEAD + REST + "parity: {bounds: [{measure: mean_kl, max: 1, baseline: a}]}\n",
            10,
            "names a baseline; parity compares the build with its source alone",
        ),
        (HEAD + "  - group: norms\n    bits: 4\n    grp_size: 64\n", 6, "grp_size: Extra inputs"),
        (HEAD + "  - group: experts\n    bits: 4\n", 4, "rules.0.group"),
        (HEAD + "  - group: norms\n", 4, "exactly one of `bits`, `dtype` and `drop: true`"),
        (HEAD + "  - group: norms\n    bits: 4\n    dtype: source\n", 4, "exactly one of `bits`"),
        (
            HEAD + "  - group: norms\n    dtype: source\n    quantizer: search\n",
            4,
            "without `bits`",
        ),
        (
            HEAD + "  - group: norms\n    bits: 4\n    group_size: 32\n    mode: mxfp4\n"
            "    quantizer: search\n",
            4,
            "quantizer is for the affine mode; mxfp4 has only MLX's own",
        ),
        (
            HEAD + REST + "quantizer: best\n",
            10,
            "quantizer: Input should be 'minmax', 'search' or 'gptq'",
        ),
        (HEAD + "  - bits: 4\n", 4, "exactly one of `group` and `match`"),
        (HEAD + "  - group: norms\n    match: a\n    bits: 4\n", 4, "exactly one of `group`"),
        (HEAD + "  - match: '['\n    bits: 4\n", 4, "is no regular expression"),
        (HEAD + "  - group: norms\n    bits: 7\n", 4, "bits is 7; MLX has 2, 3, 4, 5, 6, 8"),
        (HEAD + "  - group: norms\n    bits: 1\n", 4, "bits is 1; MLX has"),
        (HEAD + "  - group: norms\n    bits: two\n", 5, "rules.0.bits"),
        (HEAD + "  - group: norms\n    dtype: float8\n", 5, "rules.0.dtype"),
        (
            HEAD + "  - group: norms\n    bits: 4\n    group_size: 48\n",
            4,
            "group_size is 48; MLX has 32, 64, 128",
        ),
        (
            HEAD + "  - group: norms\n    bits: 4\n    mode: mxfp4\n",
            4,
            "mxfp4 has 4 bits and group_size 32",
        ),
    ],
)
def test_mistake_in_the_file(text: str, line: int, message: str) -> None:
    """A mistake is named with file, line and field."""
    with pytest.raises(RecipeError) as raised:
        parse_recipe(text, "mine.yaml")
    said = str(raised.value)
    assert said.startswith(f"mine.yaml:{line}: ")
    assert message in said


@given(st.text(max_size=60) | st.text("- []{}:&*!|>'\"#\n abc1", max_size=60))
def test_any_text_is_a_recipe_or_an_error(text: str) -> None:
    """Whatever a file holds, the answer is a RecipeError that names it."""
    with pytest.raises(RecipeError, match=r"^mine\.yaml:\d+: "):
        parse_recipe(text, "mine.yaml")


def test_recipe_that_is_not_there(tmp_path: Path) -> None:
    """A wrong name lists the right ones; a wrong path is named."""
    with pytest.raises(RecipeError, match=r"2\.56: there is no such recipe.*dynamic-2\.56bpw"):
        load_recipe("2.56")
    with pytest.raises(RecipeError, match=r"none\.yaml: the recipe cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(RecipeError, match=r"latin\.yaml: the recipe cannot be read"):
        load_recipe(tmp_path / "latin.yaml")
    with pytest.raises(RecipeError, match="there is no such recipe"):
        load_recipe("../recipes/demo")


@pytest.mark.parametrize(
    ("rules", "line", "message"),
    [
        (
            "  - match: no_such_module\n    bits: 4\n" + REST,
            4,
            r"the rule \(match 'no_such_module'\) matches none of the \d+ weights",
        ),
        (
            REST + "  - group: norms\n    dtype: source\n",
            10,
            r"the rule \(group norms\) matches none.*remove it if an earlier rule covers it",
        ),
        (
            "  - group: norms\n    bits: 4\n" + REST,
            4,
            r"quantizes tensor model\.embed_tokens|quantizes tensor \S+norm\.weight \(group norms",
        ),
        (
            "  - group: router\n    bits: 8\n" + REST,
            4,
            r"quantizes tensor \S+\.mlp\.gate\.\S+ \(group router, shape .*Give it a `dtype`",
        ),
        (
            "  - match: k_norm\n    bits: 8\n" + REST,
            4,
            r"quantizes tensor \S+\.k_norm\.(weight|bias) \(group indexer, shape \[64\]\)",
        ),
        (
            "  - group: lm_head\n    drop: true\n" + REST,
            4,
            r"drops tensor lm_head\.weight, which the model cannot run without",
        ),
        (
            "  - group: mtp\n    dtype: source\n" + REST,
            4,
            r"keeps tensor model\.layers\.4\..*`- group: mtp` with `drop: true`",
        ),
        (
            "  - match: embed_q\n    bits: 4\n    group_size: 128\n" + REST,
            4,
            r"128 does not divide the last dim 64 of tensor \S+\.0\.\S+embed_q.*one of 32, 64\.",
        ),
    ],
)
def test_rule_that_does_not_fit(
    rules: str, line: int, message: str, index_only: Callable[..., Checkpoint]
) -> None:
    """A rule that does not fit the checkpoint is named with file, line and tensor."""
    with pytest.raises(RecipeError, match=message) as raised:
        make_plan(index_only(small_config()), parse_recipe(HEAD + rules, "mine.yaml"))
    assert str(raised.value).startswith(f"mine.yaml:{line}: ")


def test_tensor_without_a_rule(index_only: Callable[..., Checkpoint]) -> None:
    """A weight that no rule covers is named with its group and the way out."""
    rules = REST.replace("lm_head", "routed_experts")
    with pytest.raises(
        RecipeError,
        match=r"mine\.yaml: no rule covers tensor lm_head\.weight \(group lm_head\).*dtype: source",
    ):
        make_plan(index_only(small_config()), parse_recipe(HEAD + rules, "mine.yaml"))


def test_first_rule_wins(index_only: Callable[..., Checkpoint]) -> None:
    """Rules are tried in order: an earlier special one takes a weight from a later general one."""
    rules = "  - match: layers\\.1\\..*switch_mlp\\.down_proj\n    bits: 8\n" + REST
    plan = make_plan(index_only(small_config()), parse_recipe(HEAD + rules, "mine.yaml"))
    by_path = {planned.weight.path: planned.scheme.describe() for planned in plan.weights}
    assert by_path["model.layers.1.mlp.switch_mlp.down_proj"] == "8-bit g64"
    assert by_path["model.layers.1.mlp.switch_mlp.up_proj"] == "4-bit g64"
    assert by_path["model.layers.2.mlp.switch_mlp.down_proj"] == "4-bit g64"


def test_quantizer_of_a_rule_and_of_the_recipe(index_only: Callable[..., Checkpoint]) -> None:
    """A rule's own quantizer comes before the recipe's, whose default is MLX's."""
    own = "  - match: layers\\.1\\..*switch_mlp\\.down_proj\n    bits: 2\n    quantizer: "
    paths = [f"model.layers.{i}.mlp.switch_mlp.down_proj" for i in (1, 2)]
    for text, expected in (
        (f"{own}search\n{REST}", ["2-bit g64 search", "4-bit g64"]),
        (f"{own}minmax\n{REST}quantizer: search\n", ["2-bit g64", "4-bit g64 search"]),
    ):
        plan = make_plan(index_only(small_config()), parse_recipe(HEAD + text, "mine.yaml"))
        by_path = {planned.weight.path: planned.scheme.describe() for planned in plan.weights}
        assert [by_path[path] for path in paths] == expected


def test_recipe_without_mtp_in_the_checkpoint(index_only: Callable[..., Checkpoint]) -> None:
    """A rule for MTP layers is no mistake where the checkpoint has none."""
    config = small_config() | {"num_nextn_predict_layers": 0}
    assert make_plan(index_only(config), load_recipe("demo")).dropped == ()


def test_layers_narrow_a_rule() -> None:
    """A rule with layers speaks of these alone, both ends included, and never of embeddings."""
    text = HEAD + "  - {group: attention, layers: [3, 10], bits: 4}\n" + REST
    rule = parse_recipe(text, "mine.yaml").rules[0]
    met = [i for i in range(20) if rule.matches(f"model.layers.{i}.self_attn.o_proj", "attention")]
    assert met == list(range(3, 11))
    assert not rule.matches("model.layers.4.mlp.up_proj", "dense_mlp")
    wide = parse_recipe(HEAD + "  - {match: '.*', layers: [0, 99], bits: 4}\n", "w.yaml").rules[0]
    assert not wide.matches("lm_head", "lm_head")
    with pytest.raises(RecipeError, match=r"mine.yaml:4: .*give the first and the last layer"):
        parse_recipe(text.replace("[3, 10]", "[10, 3]"), "mine.yaml")
