"""The card: from records alone, the same each time, and read by the Hub as it was meant."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import (
    eval_results_to_model_index,
    model_index_to_eval_results,
)
from rich.console import Console

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import CardError
from glm_quant.quantize.plan import Plan, make_plan
from glm_quant.recipe import load_recipe
from glm_quant.report import format as say
from glm_quant.report.card import (
    BuildFacts,
    CardInputs,
    PlanFacts,
    SourceFacts,
    escape,
    render_card,
    write_card,
)
from glm_quant.report.correctness import layer_errors, parity_rows
from glm_quant.report.summary import plan_summary, result_summary
from tests.card_records import (
    EPYC,
    M3,
    PARITY,
    divergence_record,
    evaluation,
    rich_divergence,
    rich_evaluation,
)


@pytest.fixture(scope="module")
def plan(release: Path) -> Plan:
    """Give the plan of the 2.56 bpw build of GLM-5.2."""
    return make_plan(Checkpoint.open(release), load_recipe("dynamic-2.56bpw"))


@pytest.fixture(scope="module")
def inputs(plan: Plan) -> CardInputs:
    """Give inputs with GLM-5.2's real plan, measured on an M3."""
    recipe = load_recipe("dynamic-2.56bpw")
    return CardInputs(
        recipe=recipe,
        command="glm-quant run dynamic-2.56bpw --source hf://zai-org/GLM-5.2@b4734de4",
        source=SourceFacts("hf://zai-org/GLM-5.2@b4734de4", "b4734de4", 282, 59_585, 10**12),
        plan=PlanFacts(
            plan.geometry,
            tuple(plan.groups()),
            plan.params,
            plan.tensor_bytes,
            sum(1 for _ in plan.tensors),
            len(plan.dropped),
            1 << 20,
        ),
        build=BuildFacts(46, 237_906_000_000, "ef" * 32, "12" * 32, {"mlx": "0.32.4"}),
        parity=parity_rows(PARITY),
        divergence=divergence_record(),
        evaluation=evaluation(M3),
        layer_errors=layer_errors(PARITY),
    )


@pytest.fixture(scope="module")
def card(inputs: CardInputs) -> str:
    return plain(render_card(inputs))


@pytest.fixture(scope="module")
def rich(inputs: CardInputs) -> str:
    """Give the card of a build with every measurement, and with baselines."""
    whole = replace(inputs, evaluation=rich_evaluation(M3), divergence=rich_divergence())
    return plain(render_card(whole))


def plain(card: str) -> str:
    """Give a card's text with ordinary spaces and hyphens."""
    return card.replace("\u00a0", " ").replace("\u2011", "-")


def outside_code(text: str) -> str:
    """Give a card's Markdown without front matter, code blocks and code spans."""
    body = text.split("\n---\n", 1)[1]
    return re.sub(r"`[^`\n]+`", "", re.sub(r"```.*?```", "", body, flags=re.DOTALL))


def test_rendering_again_gives_the_same_text(inputs: CardInputs, card: str) -> None:
    """Nothing in it depends on when or where it is rendered."""
    assert plain(render_card(inputs)) == card


@pytest.mark.parametrize(
    ("part", "stage"),
    [
        ("source", "download"),
        ("plan", "plan"),
        ("build", "assemble"),
        ("parity", "parity"),
        ("divergence", "divergence"),
        ("evaluation", "evaluate"),
    ],
)
def test_missing_record_is_refused_by_name(inputs: CardInputs, part: str, stage: str) -> None:
    """A card never leaves out quietly what was not measured."""
    with pytest.raises(CardError, match=f"record of stage '{stage}', which is missing"):
        render_card(replace(inputs, **{part: None}))


def test_divergence_table_is_the_records(inputs: CardInputs, card: str) -> None:
    """Each row of the record, by slice and side of index_topk, with its own numbers."""
    record = inputs.divergence
    assert record is not None
    assert [(row.slice, row.bucket) for row in record.rows] == [
        (name, bucket) for name in ("all", "co~de") for bucket in ("all", "below", "above")
    ]
    assert record.row(bucket="above").positions == 1024
    lines = [line for line in card.splitlines() if " 2,048 | " in line or "| all | " in line]
    assert len(lines) == 6
    for row, line in zip(record.rows, lines, strict=True):
        assert f"| {row.positions:,} | {row.mean_kl.value:.4f}" in line
        assert f"| {row.p99_kl:.3f} | {row.max_kl:.2f} |" in line
        assert f"| {math.exp(1.25):.3f} | {math.exp(1.5):.3f} |" in line
    assert "+0.2500 ± 0.0000 nats a token" in card


def test_front_matter_is_what_the_hub_reads(rich: str) -> None:
    """huggingface_hub parses it back, with base model, relation, tags, bits and results."""
    data = ModelCard(rich).data.to_dict()
    assert data["base_model"] == "zai-org/GLM-5.2"
    assert data["base_model_relation"] == "quantized"
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == (
        "mlx",
        "text-generation",
        "mit",
    )
    assert data["language"] == ["en", "zh"]
    assert {"mlx", "glm_moe_dsa", "2-bit", "mixed-precision"} <= set(data["tags"])
    assert data["quantization"] == {"bits": 2, "group_size": 64, "bits_per_weight": 2.56005}
    results = yaml.safe_load(rich.split("---\n")[1])["model-index"][0]["results"]
    assert [[metric["type"] for metric in r["metrics"]] for r in results] == [
        ["perplexity"],
        ["perplexity"],
        ["accuracy"],
        ["acc_norm"],
        ["acc"],
        ["acc"],
        ["kl_divergence", "accuracy"],
    ]
    assert results[0]["metrics"][0]["value"] == 3.7
    assert results[0]["dataset"]["args"]["sha256"] == "ab" * 32


def test_results_survive_the_clients_own_reading(rich: str) -> None:
    """Model-index to results and back: names, values and datasets are what was written.

    Each result has what the Hub asks for: task and dataset by type, a metric by type and value.
    """
    index = yaml.safe_load(rich.split("---\n")[1])["model-index"]
    name, results = model_index_to_eval_results(index)
    assert name == "GLM-5.2-MLX-Dynamic-2.56bpw"
    assert len(results) == 8
    for result in results:
        assert result.task_type == "text-generation"
        assert isinstance(result.metric_value, float)
        assert result.dataset_type
        assert result.dataset_name
        assert result.metric_type
    again = eval_results_to_model_index(name, results)
    assert again == index


def test_licence_unknown_to_the_hub_is_other_with_a_name(inputs: CardInputs) -> None:
    """The Hub refuses identifiers that are not on its list."""
    publish = inputs.recipe.publish.model_copy(update={"license": "psf-2.0"})
    text = render_card(
        replace(inputs, recipe=inputs.recipe.model_copy(update={"publish": publish}))
    )
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["license"], front["license_name"]) == ("other", "psf-2.0")
    assert front["license_link"] == "LICENSE"


def test_no_text_vanishes_or_is_struck_through(rich: str) -> None:
    """No bare tilde, no raw tag outside code; also where a record's words have them."""
    body = outside_code(rich)
    assert not re.search(r"(?<!\\)~", body)
    assert not re.search(r"<[a-zA-Z/]", body)
    assert r"wiki \~a\~ &lt;b>" in body
    assert "greedy &lt;think> output" in body


def test_tables_are_well_formed(rich: str) -> None:
    """Every row has the cells of its head, an empty line comes before, and none is open."""
    lines = outside_code(rich).splitlines()
    heads = [
        i for i, line in enumerate(lines) if re.fullmatch(r"\|(?:-*:?\|)+|\|(?:-+:?\|)+", line)
    ]
    assert len(heads) == 10
    for head in heads:
        cells = len(split_cells(lines[head]))
        assert lines[head - 2] == ""
        row = head - 1
        while lines[row]:
            assert lines[row].startswith("|"), lines[row]
            assert lines[row].endswith("|"), lines[row]
            assert len(split_cells(lines[row])) == cells, lines[row]
            row += 1
        assert row > head + 1, lines[head - 1]


def split_cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line)[1:-1]


def test_baselines_are_columns_before_this_build(rich: str) -> None:
    """A baseline that was measured on another machine has no speeds here."""
    assert r") | 3.5 bpw | uni\~form\|4 | **this** |" in rich
    hellaswag = r"| HellaSwag (acc\_norm) | 0.636 | 0.610 | 0.636 ± 0.021 | – | **0.636 ± 0.021** |"
    assert hellaswag in rich
    assert "| Generation after 512 tokens, tok/s | – | – | 20.00 | – | **20.00** |" in rich
    assert "| Long outputs that end in a loop | – | – | 1 of 2 | 1 of 2 | **1 of 2** |" in rich


def test_a_baseline_measured_otherwise_has_no_cell(inputs: CardInputs) -> None:
    """A perplexity on fewer tokens of the same text is another figure."""
    record = rich_evaluation(M3)
    first, second = record.baselines
    loss = first.measurements.perplexity[0].model_copy(update={"tokens": 512})
    measured = first.measurements.model_copy(update={"perplexity": [loss]})
    others = (first.model_copy(update={"measurements": measured}), second)
    whole = replace(inputs, evaluation=record.model_copy(update={"baselines": others}))
    name, here = r"| Perplexity, strided, wiki \~a\~ &lt;b> |", "3.700 ± 0.042"
    assert f"{name} – | – | – | {here} | **{here}** |" in plain(render_card(whole))


@pytest.mark.parametrize(
    ("part", "change"), [("harness", {"limit": 100}), ("peer_perplexity", {"seed": 1})]
)
def test_published_figures_stand_only_beside_the_same_protocol(
    inputs: CardInputs, part: str, change: dict[str, int]
) -> None:
    """Another number of items or another seed, and the other cards' figures are not shown."""
    record = rich_evaluation(M3)
    whole = replace(inputs, evaluation=record, divergence=rich_divergence())
    assert "[avlp12 2.56 bpw](https://huggingface.co/avlp12/GLM-5.2" in render_card(whole)
    other = getattr(record.measurements, part).model_copy(update=change)
    measured = record.measurements.model_copy(update={part: other})
    text = plain(
        render_card(replace(whole, evaluation=record.model_copy(update={"measurements": measured})))
    )
    lines = {line.split(" | ")[0]: line for line in text.splitlines()}
    gone = "| PIQA (acc)" if part == "harness" else "| Perplexity, allenai/tulu-3-sft-mixture"
    kept = "| Perplexity, allenai/tulu-3-sft-mixture" if part == "harness" else "| PIQA (acc)"
    assert " | – | – | " in lines[gone]
    assert " | – | – | " not in lines[kept]


def test_differences_have_their_paired_error(rich: str) -> None:
    """Only what was taken pair by pair; speeds have no error and are columns alone."""
    assert "| KL to the source, mean, 3.5 bpw | 0.5 | 0.117 | **+0.383** ± 0.011 | 2 |" in rich
    assert r"| loss beside the source's, co\~de, 3.5 bpw | 0.25 | 0.0811 | **+0.1689** ±" in rich
    assert "| PIQA, 3.5 bpw | 0.796 | 0.828 | **-0.032** ± 0.012 | 500 |" in rich
    assert "decode after" not in rich


def test_quality_by_bits_is_charted_where_builds_were_compared(
    inputs: CardInputs, rich: str, card: str
) -> None:
    """This build and the baselines with a KL on the same tokens; without KL, their perplexity."""
    assert "this build 2.56 bpw · 0.5000, 3.5 bpw 3.54 bpw · 0.1170](assets/bits.png#hf-" in rich
    assert "assets/bits.png" not in card
    losses = plain(render_card(replace(inputs, evaluation=rich_evaluation(M3))))
    assert "by size in memory: this build 237.9 GB · 3.700, 3.5 bpw 328.5 GB · 2.814]" in losses


def test_numbers_stay_with_their_units(inputs: CardInputs) -> None:
    """On a phone "± 0.042" and "95.2 %" do not break; commands keep their ordinary spaces."""
    text = render_card(inputs)
    assert "3.700\u00a0±\u00a00.042" in text
    assert "226.5\u00a0GB | 95.2\u00a0% |" in text
    assert "| 2.0e\u201106 | ≤ 2e\u201105 |" in text
    assert all("\u00a0" not in block for block in re.findall(r"```.*?```", text, re.DOTALL))


def test_every_section_is_there_in_order(card: str) -> None:
    """The order in which a reader needs them."""
    assert re.findall(r"^## (.+)$", card, re.MULTILINE) == [
        "Metrics",
        "Why this model",
        "Quality",
        "Benchmarks",
        "Recipe",
        "Correctness",
        "Usage",
        "Hardware and memory",
        "Reproduction",
        "Credits",
        "Citation",
    ]


def test_numbers_are_those_of_the_records(card: str) -> None:
    """One figure of every record, as it stands there."""
    for figure in (
        "**237.9 GB** (221.5 GiB), 3,355 tensors in 46 shards",
        "743.4B parameters, 40.30B active per token",
        "| Bits per weight | **2.560** |",
        "| **3.700 ± 0.042** |",
        "| Routed experts | 2-bit g64 gptq | 724.8B | 97.5 % | 226.5 GB | 95.2 % |",
        "| KL divergence to the source, mean, nats | 0.3210 | ≤ 0.8 |",
        "| Same most likely token as the source | 81.5 % | ≥ 70.0 % |",
        "| 512 | 128.0 | 20.0 | 238.1 GB |",
        "| 8K | 237.9 GB | 736.1 MB | 44.04 MB | 1.29 GB | **240.0 GB** | 239.6 GB |",
        "holds 8K tokens has **256 GB**: of its 274.9 GB, 34.92 GB are left",
        "| 256 GB | does not fit | 274K tokens | 509K tokens |",
        "takes 89,856 bytes for MLA and 5,376 for the indexer",
        "at revision `b4734de4`, 282 shards, 59,585 tensors",
        f"sha256 `{'ef' * 32}`",
        "one on 21 of 78 layers",
    ):
        assert figure in card


def test_figures_follow_the_records(inputs: CardInputs) -> None:
    """Another measurement is another card: no number is typed in."""
    assert inputs.evaluation is not None
    found = inputs.evaluation.measurements
    changed = found.model_copy(
        update={"perplexity": [found.perplexity[0].model_copy(update={"value": 5.4321})]}
    )
    text = render_card(
        replace(inputs, evaluation=inputs.evaluation.model_copy(update={"measurements": changed}))
    )
    assert text.count("5.432") == 3  # front matter, metrics, benchmarks
    assert "3.700" not in text


def test_speeds_from_another_machine_are_marked(inputs: CardInputs, card: str) -> None:
    """A reader with a Mac must not take a server's speeds for his own."""
    assert "not measured on Apple Silicon" not in card
    other = plain(render_card(replace(inputs, evaluation=evaluation(EPYC))))
    assert "not measured on Apple Silicon" in other
    assert r"AMD EPYC (Linux x86\_64, 2 cores, 24 GB, cpu)" in other


def test_footprint_is_among_builds_of_that_model(inputs: CardInputs, card: str) -> None:
    """Other builds' sizes say nothing about a model of another size: there the source has a bar."""
    assert "avlp12" in alt_of(card, "footprint")
    assert "The source" not in alt_of(card, "footprint")
    assert inputs.plan is not None
    smaller = replace(inputs, plan=replace(inputs.plan, params=inputs.plan.params // 2))
    assert "The source 1.00 TB" in alt_of(plain(render_card(smaller)), "footprint")
    assert "avlp12" not in render_card(smaller)


def alt_of(card: str, chart: str) -> str:
    found = re.search(rf"!\[([^\]]*)\]\(assets/{chart}\.png#hf-light-mode-only\)", card)
    assert found
    return found[1]


def test_items_that_are_not_the_tasks_own_are_named(inputs: CardInputs) -> None:
    """PIQA's protocol on other items is not PIQA: in the table, beside baselines, in front."""
    record = rich_evaluation(M3)
    harness = record.measurements.harness
    assert harness is not None
    local = {"dataset": "mine.jsonl", "dataset_sha256": "ab" * 32}
    tasks = [task.model_copy(update=local) for task in harness.tasks]
    measured = record.measurements.model_copy(
        update={"harness": harness.model_copy(update={"tasks": tasks})}
    )
    text = plain(
        render_card(
            replace(inputs, evaluation=record.model_copy(update={"measurements": measured}))
        )
    )
    assert "| mine.jsonl, asked as PIQA (acc) | – | – | " in text
    assert "| mine.jsonl, asked as PIQA, 3.5 bpw | 0.796 | 0.828 |" in text
    names = re.findall(r"dataset:\n +name: (.+)\n +type: (.+)\n", text)
    assert ("mine.jsonl", "mine.jsonl") in names
    assert not any("piqa" in name for name, _ in names)


def test_writing_leaves_card_and_charts(inputs: CardInputs, tmp_path: Path) -> None:
    """Every picture that the card shows lies beside it; the Hub shows one of each pair."""
    written = write_card(inputs, tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")) == written
    text = (tmp_path / "README.md").read_text()
    pictures = re.findall(r"!\[(.+?)\]\((assets/.+?)#hf-(\w+)-mode-only\)", text)
    light, dark = pictures[::2], pictures[1::2]
    assert {mode for _, _, mode in light} == {"light"}
    assert [(alt, path.replace(".png", "-dark.png"), "dark") for alt, path, _ in light] == dark
    assert text.count("![") == len(pictures)
    assert [Path(path).stem for _, path, _ in light] == [
        "recipe",
        "footprint",
        "divergence",
        "layers",
        "needle",
        "memory",
    ]
    assert {path for _, path, _ in pictures} < set(written)


def test_escaping_keeps_every_character_visible() -> None:
    """Markdown's own characters, tags and line breaks."""
    assert escape("~2 <think> a_b | c*\nd") == r"\~2 &lt;think> a\_b \| c\* d"


@pytest.mark.parametrize(
    ("call", "value", "text"),
    [
        (say.size, 237_885_660_672, "237.9 GB"),
        (say.size, 7.24e9, "7.24 GB"),
        (say.size, 999, "999 B"),
        (say.size, 1.5067e12, "1.51 TB"),
        (say.count, 743_377_019_904, "743.4B"),
        (say.percent, 0.97498, "97.5 %"),
        (say.percent, 0.0000016, "0.00016 %"),
        (say.percent, 0, "0 %"),
        (say.tokens, 8192, "8K"),
        (say.tokens, 7586, "7,586"),
        (say.tokens, 1 << 20, "1M"),
        (say.about_tokens, 208_300, "203K"),
    ],
)
def test_numbers_are_spelt_for_people(
    call: Callable[[float], str], value: float, text: str
) -> None:
    assert call(value) == text


def shown(renderable: object) -> str:
    console = Console(file=StringIO(), width=110, force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_plan_summary_has_exact_totals(plan: Plan) -> None:
    """The terminal gives the exact figures, the table readable ones."""
    text = shown(plan_summary(plan, "dynamic-2.56bpw", 1 << 20))
    assert "743,377,019,904 parameters at 2.56005 bits per weight" in text
    assert "237,885,660,672 bytes of tensors in 46 shards" in text
    assert "240.0 GB of memory to read 8K tokens" in text
    assert re.search(r"Routed experts +724\.8B +97\.5 % +2-bit g64 gptq +226\.5 GB +95\.2 %", text)


def test_result_summary_reads_like_a_result(inputs: CardInputs, tmp_path: Path) -> None:
    """Figures of every stage, then the paths; parts that are missing are left out."""
    text = shown(result_summary(inputs, tmp_path, ["/published/here"]))
    for part in (
        "within 3.0e-06 of transformers",
        "0.3210",
        "81.5 %",
        "3.700 ± 0.042",
        "1 of 1 facts",
        "prefill 128.0, decode 20.0 tok/s",
        "/published/here",
    ):
        assert part in text
    bare = shown(
        result_summary(replace(inputs, parity=None, divergence=None, evaluation=None), tmp_path)
    )
    assert "perplexity" not in bare
    assert "README.md" not in bare


def test_layers_are_charted_only_where_all_were_followed() -> None:
    """A gap would be drawn as if it had been measured."""
    assert layer_errors(PARITY) == pytest.approx((0.1, 0.2, 0.3))
    first, *rest = PARITY.layers
    gap = [first.model_copy(update={"build_error": None}), *rest]
    assert layer_errors(PARITY.model_copy(update={"layers": gap})) == ()
