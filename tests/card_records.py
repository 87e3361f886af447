"""Records of a build, as cards are made of: figures that no other record has."""

import numpy as np

from glm_quant.evaluation.compare import Positions
from glm_quant.evaluation.divergence_record import (
    DivergenceRecord,
    PassFacts,
    SliceFacts,
    make_rows,
)
from glm_quant.evaluation.peer_records import Harness, HarnessScore, HarnessTask, PeerPerplexity
from glm_quant.evaluation.records import (
    BaselineMeasurements,
    Coherence,
    Comparison,
    EvaluationRecord,
    Load,
    LongOutput,
    Machine,
    Measurements,
    Needle,
    NeedleTrial,
    Perplexity,
    Speed,
)
from glm_quant.parity.check import ParityRecord
from glm_quant.parity.stream import LayerParity
from glm_quant.parity.whole import LogitParity
from glm_quant.recipe import ParitySettings
from glm_quant.settings import Bound

M3 = Machine(
    system="Darwin arm64",
    processor="Apple M3 Ultra",
    cores=32,
    memory_bytes=512 << 30,
    device="gpu",
    is_apple_silicon=True,
)
EPYC = Machine(
    system="Linux x86_64",
    processor="AMD EPYC",
    cores=2,
    memory_bytes=24 << 30,
    device="cpu",
    is_apple_silicon=False,
)
PARITY = ParityRecord(
    versions={"torch": "2"},
    tokens=2304,
    prompt="seeded",
    index_topk=2048,
    layers=[
        LayerParity(
            layer=i, kind="full", attention_error=1e-6, mlp_error=2e-6, build_error=0.1 * (i + 1)
        )
        for i in range(3)
    ],
    max_layer_error=2e-6,
    ties=0,
    logits=LogitParity(below_topk=1e-6, above_topk=3e-6, cached=2e-6),
    mean_kl=0.321,
    max_kl=4.5,
    top1_agreement=0.815,
    settings=ParitySettings(
        bounds=(Bound(measure="mean_kl", max=0.8), Bound(measure="top1_agreement", min=0.7))
    ),
)


def evaluation(machine: Machine) -> EvaluationRecord:
    trial = NeedleTrial(
        length=8192,
        depth=0.5,
        prompt_tokens=8190,
        phrasing=0,
        expected="4719",
        reply="4719",
        retrieved=True,
    )
    return EvaluationRecord(
        fingerprint="f",
        measurements=Measurements(
            machine=machine,
            arithmetic="the dtypes of the build",
            versions={"glm-quant": "0.1.0", "mlx": "0.32.4", "mlx-lm": "0.32.2"},
            load=Load(seconds=61.2, mlx_bytes=237_900_000_000),
            perplexity=[
                Perplexity(
                    text="wiki ~a~ <b>",
                    text_sha256="ab" * 32,
                    tokens=102_400,
                    scored_tokens=102_399,
                    context=2048,
                    stride=1024,
                    windows=99,
                    mean_nll=1.30833,
                    value=3.69999,
                    standard_error=0.0421,
                    method="strided",
                )
            ],
            speed=[
                Speed(
                    prompt_tokens=512,
                    generated_tokens=65,
                    prefill_seconds=4.0,
                    decode_seconds=3.2,
                    mlx_peak_bytes=238_100_000_000,
                )
            ],
            needle=Needle(text_sha256="cd" * 32, method="greedy", trials=[trial]),
            peak_rss_bytes=239_000_000_000,
            mlx_peak_bytes=238_400_000_000,
            seconds=900.0,
        ),
    )


def divergence_record() -> DivergenceRecord:
    """What 4,096 positions would come to whose KL grows evenly."""
    kl = np.linspace(0.1, 0.9, 4096)
    positions = Positions(kl, kl < 0.7, np.full(4096, 1.25), np.full(4096, 1.5))
    facts = PassFacts(
        seconds=1.0, weight_bytes=10**12, planned_bytes=10**10, waves=1, mlx_peak_bytes=10**9
    )
    return DivergenceRecord(
        fingerprint="f",
        reference="r",
        source="hf://zai-org/GLM-5.2@b4734de4",
        build="b",
        index_topk=2048,
        slices=[SliceFacts(name="co~de", text_sha256="ef" * 32, lengths=[3072, 1024])],
        rows=make_rows(["co~de"] * 2, [3072, 1024], positions, 2048),
        reference_pass=facts,
        build_pass=facts,
        compare_seconds=1.0,
        versions={},
    )


def rich_evaluation(machine: Machine) -> EvaluationRecord:
    """All that a recipe can ask for, with a baseline of the same machine and one of another."""
    record = evaluation(machine)
    measured = record.measurements.model_copy(
        update={"peer_perplexity": PEER, "harness": HARNESS, "coherence": COHERENCE}
    )
    other = M3 if machine == EPYC else EPYC
    here = measured.model_copy(update={"load": Load(seconds=80.0, mlx_bytes=328_482_627_072)})
    there = measured.model_copy(update={"machine": other, "harness": None, "needle": None})
    return record.model_copy(
        update={
            "measurements": measured,
            "baselines": (
                BaselineMeasurements(name="3.5 bpw", build="aa", measurements=here),
                BaselineMeasurements(name="uni~form|4", build="bb", measurements=there),
            ),
            "comparisons": (
                compared("perplexity", "3.5 bpw", (3.69999, 2.81401), (0.0311, 99)),
                compared("harness/piqa", "3.5 bpw", (0.796, 0.828), (0.0123, 500)),
                compared("decode/512", "3.5 bpw", (20.0, 21.29), (None, 0)),
            ),
        }
    )


def rich_divergence() -> DivergenceRecord:
    """The record beside a baseline's on the same tokens."""
    kl = compared("mean_kl", "3.5 bpw", (0.5, 0.117), (0.0112, 2))
    loss = compared("nll_difference/co~de", "3.5 bpw", (0.25, 0.0811), (0.0123, 2))
    return divergence_record().model_copy(update={"comparisons": (kl, loss)})


def compared(
    measure: str, baseline: str, values: tuple[float, float], error: tuple[float | None, int]
) -> Comparison:
    return Comparison(
        measure=measure,
        baseline=baseline,
        value=values[0],
        baseline_value=values[1],
        difference=values[0] - values[1],
        standard_error=error[0],
        pairs=error[1],
    )


PEER = PeerPerplexity(
    dataset="allenai/tulu-3-sft-mixture",
    dataset_sha256=None,
    sequence_length=2048,
    samples=50,
    seed=123,
    batch_size=8,
    value=3.8501,
    standard_error=0.0217,
    sequence_nll=[1.348] * 50,
    method="mlx_lm.perplexity",
)
HARNESS = Harness(
    version="0.4.11",
    shots=0,
    limit=500,
    seed=123,
    chat_template=False,
    method="mlx_lm.evaluate",
    tasks=[
        HarnessTask(
            task=task,
            version="1.0",
            dataset=dataset,
            dataset_sha256=None,
            metric=metric,
            scores=[HarnessScore(metric=metric, value=value, standard_error=0.0215)],
            items=[1.0] * 500,
        )
        for task, dataset, metric, value in (
            ("hellaswag", "Rowan/hellaswag", "acc_norm", 0.636),
            ("piqa", "baber/piqa", "acc", 0.796),
            ("winogrande", "allenai/winogrande", "acc", 0.708),
        )
    ],
)
COHERENCE = Coherence(
    ngram=20,
    method="greedy <think> output",
    outputs=[
        LongOutput(
            prompt="Tell a long story.",
            tokens=4096,
            ended=False,
            repeated_share=0.0312,
            longest_repeat=41,
            loop_period=period,
            text="Once",
        )
        for period in (None, 7)
    ],
)
