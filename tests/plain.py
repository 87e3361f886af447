"""The recipe `plain.yaml`, which only tests use."""

from pathlib import Path

PLAIN = str(Path(__file__).with_name("plain.yaml"))
