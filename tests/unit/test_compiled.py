"""Compiled loops are kept so that processes side by side cannot mix them up."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from glm_quant.compiled import compiled
from glm_quant.compiling import KeyedCacheFile


def test_variants_saved_at_the_same_time(tmp_path: Path) -> None:
    """Of two processes that save two variants at once, neither gets the other's code.

    The second reads the index before the first writes it, and writes while the first does.
    """
    first = KeyedCacheFile(tmp_path, "loop", "stamp")
    second = KeyedCacheFile(tmp_path, "loop", "stamp")
    empty = second._load_index()
    save_data = first._save_data

    def meanwhile(name: str, data: str) -> None:
        second._load_index = lambda: empty
        second.save("4 bits", "code for 4 bits")
        save_data(name, data)

    first._save_data = meanwhile
    first.save("2 bits", "code for 2 bits")
    again = KeyedCacheFile(tmp_path, "loop", "stamp")
    assert again.load("4 bits") in ("code for 4 bits", None)
    assert again.load("2 bits") in ("code for 2 bits", None)
    second.save("4 bits", "code for 4 bits")
    assert again.load("4 bits") == "code for 4 bits"


def test_code_of_another_source_is_not_used(tmp_path: Path) -> None:
    """After a change of the source file, nothing that was kept is used."""
    KeyedCacheFile(tmp_path, "loop", "old").save("key", "old code")
    new = KeyedCacheFile(tmp_path, "loop", "new")
    assert new.load("key") is None
    new.save("key", "new code")
    assert new.load("key") == "new code"


def _double(value: float) -> float:
    return 2 * value


def test_loops_are_kept() -> None:
    """A compiled loop is loaded the next time: numba's dispatcher uses this cache."""
    for _ in range(2):
        loop = compiled(_double)
        assert loop(1.5) == 3.0
    assert sum(loop.dispatcher.stats.cache_hits.values()) == 1


def test_commands_that_compute_nothing_do_without_numba() -> None:
    """Numba's import takes longer than many a command."""
    modules = "flows.cli.main, glm_quant.convert"
    code = f"import sys, {modules}; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _spin(running: Any, stop: Any, limit: Any) -> Any:  # pragma: no cover - compiled
    """Set `running[0]`, then turn until somebody sets `stop[0]`."""
    for turn in range(limit):
        # Written in each turn: the compiler must take the two for the same memory, and so reads
        # `stop` in each turn too.
        running[0] = turn + 1
        if stop[0]:
            return turn
    return -1


def test_other_threads_go_on_while_a_loop_runs() -> None:
    """Heartbeats, logs and progress of a run come from threads beside the loops.

    A loop ends when another thread, which waits for it to run, has had its turn. Were the lock
    held, the thread would have none, and the loop would end at its limit.
    """
    running, stop = np.zeros(1, np.int64), np.zeros(1, np.int64)
    spin = compiled(_spin)
    assert spin(running, stop, 1) == -1  # compiled by now
    running[0] = 0

    def end_it() -> None:
        while not running[0]:
            time.sleep(0.001)
        stop[0] = 1

    thread = threading.Thread(target=end_it)
    thread.start()
    turns = spin(running, stop, 1 << 35)
    thread.join()
    assert turns >= 0
