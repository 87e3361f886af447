"""The terminal's bars."""

import io

import pytest
from rich.console import Console

from flows.cli.terminal import Terminal


def test_time_left_is_shown_however_slow_a_stage_moves() -> None:
    """A layer of a large model takes minutes; after two of them the time left is known."""
    now = 0.0
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)

    def stopped_run() -> None:
        nonlocal now
        with Terminal(console, 1, clock=lambda: now) as terminal:
            terminal.begin("measure")
            for layer in range(1, 4):
                now = 300.0 * layer
                terminal.move("measure", layer, 10)
            raise KeyboardInterrupt  # so that the bars stay as they are

    with pytest.raises(KeyboardInterrupt):
        stopped_run()
    assert "0:35:00" in screen.getvalue()
