"""What a terminal and a log file show of a command's stages: share, rate and time left."""

import io
import re

import pytest
from rich.console import Console

from flows.cli.display import StageDisplay


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines(output: io.StringIO) -> list[str]:
    """Return the lines without their time of day."""
    return [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in output.getvalue().splitlines()]


def test_a_log_file_gets_a_line_at_each_begin_and_end_and_between() -> None:
    """Bytes a second and the time left where bytes are known, else shares a minute."""
    output, clock = io.StringIO(), Clock()
    display = StageDisplay(
        Console(file=output, soft_wrap=True), [6_000_000, 4_000_000], clock=clock
    )
    assert display.place() == " before the first stage"
    with display:
        display.begin("quantize")
        display.move("quantize", 1, 1)
        clock.now += 60
        display.tell()
        display.begin("quantize")
        display.begin("upload")
        display.move("quantize", 1, 4)
        clock.now += 60
        display.tell()
        assert display.place() == " in quantize, 70% done"
        display.begin("parity")
        clock.now += 120
        display.tell()
        display.move("parity", 1, 10)
        clock.now += 60
        display.tell()
    assert lines(output) == [
        "quantize: begins",
        "quantize: 60%, 6.00 MB of 10.00 MB, 100.0 kB/s, 40 s left",
        "upload: begins, beside the other stages",
        "quantize: 70%, 7.00 MB of 10.00 MB, 16.67 kB/s, 3 min left",
        "quantize: done, after 2 min",
        "parity: begins",
        "parity: 0%, 2 min so far",
        "parity: 10%, 10.0% a minute, 9 min left",
        "parity: done, after 3 min",
    ]


def test_lines_come_by_themselves_and_end_with_the_display() -> None:
    """A stage that says nothing for hours has a line a minute; one that fails says where."""
    output = io.StringIO()
    display = StageDisplay(Console(file=output, soft_wrap=True), seconds_between_lines=0.001)
    try:
        with display:
            display.begin("parity")
            display.move("parity", 1, 2)
            while "50%" not in output.getvalue():
                pass
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    last = lines(output)[-1]
    assert last.startswith("parity: stopped at 50%, after ")


def test_a_closed_log_ends_no_run() -> None:
    """A pipe or a terminal that nobody reads any more: the work goes on."""

    class Closed(io.StringIO):
        def write(self, _: str, /) -> int:
            raise BrokenPipeError

    with StageDisplay(Console(file=Closed())) as display:
        display.begin("plan")
        display.move("plan", 1, 1)


def test_time_left_is_shown_however_slow_a_stage_moves() -> None:
    """A layer of a large model takes minutes; after two of them the time left is known."""
    now = 0.0
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)

    def stopped_run() -> None:
        nonlocal now
        with StageDisplay(console, clock=lambda: now) as terminal:
            terminal.begin("measure")
            for layer in range(1, 4):
                now = 300.0 * layer
                terminal.move("measure", layer, 10)
            raise KeyboardInterrupt  # so that the bars stay as they are

    with pytest.raises(KeyboardInterrupt):
        stopped_run()
    assert "0:35:00" in screen.getvalue()
