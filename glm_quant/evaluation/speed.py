"""Load time, generation speed and memory, as a user of stock mlx-lm meets them.

On a model of 100 GB and more, macOS pages weights out between tokens
unless the wired limit is raised first; mlx-lm's own generation does that, and so does `wired`.
"""

import platform
import resource
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from os import cpu_count
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step, wired_limit

from glm_quant.evaluation.records import Load, Machine, Speed
from glm_quant.memory import physical_bytes


def load_build(checkpoint: Path) -> tuple[Any, Any, Load]:
    """Load a build as a user does: stock mlx-lm, strictly, with the runtime that travels in it.

    Returns:
        The model, its tokenizer, and what loading took.
    """
    begin = time.perf_counter()
    model, tokenizer = load(
        str(checkpoint), tokenizer_config={"trust_remote_code": True}, trust_remote_code=True
    )[:2]
    seconds = time.perf_counter() - begin
    return model, tokenizer, Load(seconds=round(seconds, 3), mlx_bytes=mx.get_active_memory())


def choose_arithmetic(model: Any) -> str:
    """Let a model compute in float32 where there is no GPU; returns what it computes in.

    MLX's CPU backend computes 16-bit matrix products 5 to 30 times slower than float32 ones. The
    quantized codes stay as they are, and bfloat16 scales are exact in float32.
    """
    if mx.default_device() == mx.gpu:
        return "the dtypes of the build"
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return "float32, since MLX computed on the CPU"


@contextmanager
def wired(model: Any) -> Generator[None]:
    """Keep weights resident on a machine with Metal; elsewhere do nothing."""
    with wired_limit(model):
        yield


def measure_speed(model: Any, prompt: Sequence[int], generate_tokens: int) -> Speed:
    """Time one greedy generation.

    Args:
        model: a model of mlx-lm.
        prompt: token ids.
        generate_tokens: tokens to make, at least two.
    """
    mx.clear_cache()
    mx.reset_peak_memory()
    begin = time.perf_counter()
    first = begin
    generated = 0
    for _ in generate_step(mx.array(list(prompt)), model, max_tokens=generate_tokens):
        generated += 1
        if generated == 1:
            first = time.perf_counter()
    end = time.perf_counter()
    return Speed(
        prompt_tokens=len(prompt),
        generated_tokens=generated,
        prefill_seconds=round(first - begin, 6),
        decode_seconds=round(end - first, 6),
        mlx_peak_bytes=mx.get_peak_memory(),
    )


def warm_up(model: Any, prompt: Sequence[int]) -> None:
    """Generate a few tokens, so that no measurement pays for compiling kernels."""
    measure_speed(model, prompt[:16], 4)


def peak_rss_bytes() -> int:
    """Return this process's peak resident memory (macOS counts bytes, Linux KiB)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def this_machine() -> Machine:
    """Describe the machine without naming it."""
    system, architecture = platform.system(), platform.machine()
    return Machine(
        system=f"{system} {architecture}",
        processor=_processor() or architecture,
        cores=cpu_count() or 1,
        memory_bytes=physical_bytes(),
        device="gpu" if mx.default_device() == mx.gpu else "cpu",
        is_apple_silicon=(system, architecture) == ("Darwin", "arm64"),
    )


def _processor() -> str | None:
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None
