"""What the end-to-end tests share: the command line in a subprocess, and a quick recipe."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from glm_quant.data import tiny_glm_path
from tests.e2e.command_line import CommandLine
from tests.e2e.network import RecordingProxy
from tests.e2e.service import Server, Service, tracebacks
from tests.hub_server import HubServer
from tests.s3_server import KEYS, connect, seaweed

UPSTREAM = "upstream/tiny"
HUB_TOKEN = "hf_" + "PlantedInASecretBlock"
AWS_SECRET = KEYS["AWS_SECRET_ACCESS_KEY"]
BUCKET = "models"

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
divergence: {tokens: 72, context: 72}
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


@pytest.fixture(scope="package")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """The command line as it is after installation: Prefect's API embedded, a fresh database."""
    return CommandLine(tmp_path_factory.mktemp("embedded"))


@pytest.fixture(scope="package")
def outside() -> Iterator[RecordingProxy]:
    """What stands between server, worker and their commands and the world: nothing may be asked."""
    proxy = RecordingProxy()
    yield proxy
    proxy.close()


@pytest.fixture(scope="package")
def server(outside: RecordingProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One running Prefect server with a fresh database."""
    home = CommandLine(tmp_path_factory.mktemp("served"))
    started = Server(home.with_variables({"HTTPS_PROXY": outside.url}))
    started.start()
    yield started
    started.kill()
    assert not tracebacks(started.log), "the server's log has tracebacks"


@pytest.fixture(scope="package")
def cli(server: Server) -> CommandLine:
    """The command line beside the running Prefect server, which saves each start's own."""
    return server.command_line


@pytest.fixture(scope="package")
def hub() -> Iterator[HubServer]:
    """A Hub with the small checkpoint in a private repository, which needs a token."""
    with HubServer(token=HUB_TOKEN) as started:
        started.add_folder(UPSTREAM, tiny_glm_path(), private=True)
        yield started


@pytest.fixture(scope="package")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a SeaweedFS with an empty bucket."""
    with seaweed(tmp_path_factory.mktemp("weed")) as (host, port):
        url = f"http://{host}:{port}"
        connect(url, seconds=20).create_bucket(Bucket=BUCKET)
        yield url


@pytest.fixture(scope="package")
def service(
    server: Server, hub: HubServer, s3_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A worker at that server, with pool, deployments and automations, and what it needs to know.

    The Hub's token is in a Secret block, those of AWS are in the worker's environment.
    """
    command_line = server.command_line.with_variables(
        {
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "GLM_QUANT_RESTART_SECONDS": "5",
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "AWS_ENDPOINT_URL": s3_url,
            "AWS_DEFAULT_REGION": "us-east-1",
            **KEYS,
        }
    )
    started = Service(server, command_line, tmp_path_factory.mktemp("service") / "home")
    started.start_worker()
    started.save_secret("hf-token", HUB_TOKEN)
    yield started
    started.kill_worker()
    assert not tracebacks(started.log), "the worker's log has tracebacks"


@pytest.fixture(scope="package")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file for quick whole runs."""
    path = tmp_path_factory.mktemp("recipe") / "quick.yaml"
    path.write_text(QUICK)
    return path
