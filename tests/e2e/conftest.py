"""What the end-to-end tests share: the command line in a subprocess, and a quick recipe."""

import os
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.command_line import CommandLine

# The small checkpoint with as little parity and evaluation as the stages accept.
QUICK = """\
name: quick
description: As demo, quick
shard_bytes: 400_000
rules:
  - {group: routed_experts, bits: 2}
  - {group: [attention, shared_experts, dense_mlp], bits: 4}
  - {group: [embeddings, lm_head], bits: 6}
  - {group: router, dtype: bfloat16}
  - {group: indexer, dtype: float16}
  - {group: norms, dtype: source}
  - {group: mtp, drop: true}
parity: {tokens: 72}
evaluation:
  perplexity_tokens: 64
  context: 64
  stride: 32
  generation_tokens: 2
  prompt_tokens: [16]
publish:
  license: psf-2.0
  acknowledge_license: 3b2f81fe21d181c499c59a256c8e1968455d6689d269aa85373bfb6af41da3bf
  languages: [en]
"""


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """The command line as it is after installation: Prefect's API embedded, a fresh database."""
    return CommandLine(tmp_path_factory.mktemp("embedded"))


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """The command line beside one running Prefect server, which saves each start's own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command_line = CommandLine(tmp_path_factory.mktemp("served"))
    server = command_line.start(
        *("server", "start", "--host", "127.0.0.1", "--port", str(port)), program="prefect"
    )
    try:
        deadline = time.monotonic() + 180
        while not _is_healthy(port):
            assert server.poll() is None, "the Prefect server ended"
            assert time.monotonic() < deadline, "the Prefect server did not start"
            time.sleep(0.5)
        command_line.environment["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
        yield command_line
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file for quick whole runs."""
    path = tmp_path_factory.mktemp("recipe") / "quick.yaml"
    path.write_text(QUICK)
    return path
