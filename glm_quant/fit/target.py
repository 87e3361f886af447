"""What a fit aims at: bytes of files, bits per weight, or a machine with a context.

What a reader would get wrong: "256GB" of a file is 256 · 10⁹ bytes, a Mac sold with 256 GB has
256 · 2³⁰. Of a machine's memory, `report.memory.reserved_bytes` are kept for the system, which
supposes that the limit on wired memory is raised; caches are counted in 16 bits, and so is what
reading the prompt takes.
"""

import re
from dataclasses import dataclass

from glm_quant.errors import RecipeError
from glm_quant.model.geometry import Geometry
from glm_quant.report.memory import machine_bytes, memory_need, reserved_bytes

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", re.IGNORECASE)
_BPW = re.compile(r"(\d+(?:\.\d+)?)\s*bpw", re.IGNORECASE)
_MACHINE = re.compile(r"(\d+)\s*GB\s+\w+\s+at\s+(\d+)\s*K(?:\s+context)?", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """How large a build may become.

    Attributes:
        said: the target.
        size_bytes: at most so many.
        headers: whether they are whole files; else tensors alone are counted.
        meaning: the target in words, with its number of bytes.
    """

    said: str
    size_bytes: int
    headers: bool
    meaning: str


def parse_target(text: str, geometry: Geometry, params: int) -> Budget:
    """Return the budget that a target means.

    Args:
        text: such as "238GB", "2.56bpw", "256GB Mac at 32K context".
        geometry: the model's dims.
        params: of the build.

    Raises:
        RecipeError: it is none of these, or the machine cannot hold the context itself.
    """
    said = text.strip()
    if match := _SIZE.fullmatch(said):
        size = int(float(match[1]) * _UNITS[match[2].upper()])
        return Budget(said, size, headers=True, meaning=f"{said}: {size:,} bytes of weight files")
    if match := _BPW.fullmatch(said):
        size = int(float(match[1]) * params / 8)
        return Budget(said, size, headers=False, meaning=f"{said}: {size:,} bytes of tensors")
    if match := _MACHINE.fullmatch(said):
        memory, context = machine_bytes(int(match[1])), int(match[2]) << 10
        cache, reserved = memory_need(geometry, 0, context).total_bytes, reserved_bytes()
        size = memory - reserved - cache
        if size <= 0:
            raise RecipeError(
                f"--target {said}: of {memory:,} bytes, {reserved:,} are kept for the system "
                f"and {cache:,} for the context, so nothing is left for weights. Name a larger "
                "machine or a shorter context."
            )
        meaning = (
            f"{said}: {size:,} bytes of tensors, which are {memory:,} bytes less "
            f"{reserved:,} for the system and {cache:,} for 16-bit caches and the prompt"
        )
        return Budget(said, size, headers=False, meaning=meaning)
    raise RecipeError(
        f"--target {said}: this is no target. Give a size (238GB), bits per weight (2.56bpw), or a "
        'machine with a context ("256GB Mac at 32K context").'
    )
