"""How much memory the machine has, and how much of it can still be taken."""

from os import sysconf
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")


def physical_bytes() -> int:
    """Return the machine's physical memory in bytes."""
    return sysconf("SC_PAGE_SIZE") * sysconf("SC_PHYS_PAGES")


def half_of_memory() -> int:
    """Return half of the machine's physical memory in bytes."""
    return physical_bytes() // 2


def available_bytes() -> int:
    """Return about how many bytes processes can still take without paging.

    Linux says it (MemAvailable: what is free, and what files take that can be read again). macOS
    has no such figure, since it compresses and drops pages as they are asked for: there it is three
    quarters of the physical memory, which is also about what Metal lets a process wire.
    """
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    return physical_bytes() * 3 // 4
