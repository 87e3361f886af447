"""Warnings of the log as lines in the terminal: whatever takes long, fails beside, or looks odd."""

import contextlib
import logging
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console


class _ConsoleHandler(logging.Handler):
    """Prints a warning above whatever the console draws."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line; that it cannot be printed ends nothing."""
        with contextlib.suppress(OSError):
            self._console.print(record.getMessage(), markup=False, highlight=False)


@contextmanager
def warnings_shown(console: Console) -> Generator[None]:
    """Show what the block warns of."""
    handler, logger = _ConsoleHandler(console), logging.getLogger("glm_quant")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
