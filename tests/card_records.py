"""Records of a build, as cards are made of: figures that no other record has."""

import numpy as np

from glm_quant.evaluation.compare import Positions
from glm_quant.evaluation.divergence_record import (
    DivergenceRecord,
    PassFacts,
    SliceFacts,
    make_rows,
)
from glm_quant.evaluation.records import (
    EvaluationRecord,
    Load,
    Machine,
    Measurements,
    Needle,
    NeedleTrial,
    Perplexity,
    Speed,
)
from glm_quant.parity import LayerParity, LogitParity, ParityRecord
from glm_quant.recipe import ParitySettings

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
    settings=ParitySettings(max_mean_kl=0.8, min_top1_agreement=0.7),
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
