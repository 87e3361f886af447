"""A machine dies in mid-run, another one with an empty workspace goes on."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glm_quant.data import tiny_glm_path
from tests.e2e.command_line import CommandLine
from tests.e2e.conftest import BUCKET
from tests.e2e.service import kill, wait_for
from tests.e2e.test_demo import digests
from tests.hub_server import HubServer
from tests.s3_server import KEYS, connect

pytestmark = pytest.mark.slow

REPO, TOKEN = "upstream/tiny", "hf_PlantedTokenOfTheTakeOver"
RECORDS = f"s3://{BUCKET}/records/taken"
# A source shard of 1.7 MB takes about two seconds.
SLOW = 800_000.0


@pytest.fixture
def place() -> Iterator[HubServer]:
    with HubServer(token=TOKEN) as running:
        running.add_folder(REPO, tiny_glm_path(), private=True)
        yield running


def records(client: Any, kind: str) -> set[str]:
    prefix = f"records/taken/records/{kind}/"
    listed = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", ())
    return {entry["Key"].rpartition("/")[2] for entry in listed}


def test_another_machine_takes_a_build_over(
    server: object, cli: CommandLine, quick: Path, place: HubServer, s3_url: str, tmp_path: Path
) -> None:
    """What the first one uploaded is not made again, its commit is kept, the bytes are the same.

    The recipe says nothing of records, as those that ship: `--records` alone names the place.
    """
    user = cli.with_variables(KEYS)
    user.environment |= {"HF_ENDPOINT": place.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    user.environment |= {"AWS_ENDPOINT_URL": s3_url, "AWS_DEFAULT_REGION": "us-east-1"}
    client = connect(s3_url, seconds=20)

    def command(machine: str) -> tuple[str | Path, ...]:
        where = "--workspace", tmp_path / machine, "--publish", f"s3://{BUCKET}/taken"
        source = "--source", f"hf://{REPO}", "--window", "1"
        return ("run", quick, *source, *where, "--records", RECORDS)

    place.rate = SLOW
    first = user.start(*command("first"))
    wait_for(lambda: len(records(client, "uploads")) >= 2, "no shard was uploaded and recorded")
    kill(first)
    assert first.returncode == -signal.SIGKILL
    safe = records(client, "shards") & records(client, "uploads")
    assert len(safe) >= 2
    place.rate = None
    commit = place.repos[REPO].branches["main"]
    place.add_commit(REPO, {"config.json": place.head(REPO)["config.json"]})
    # Instead of waiting until the lease is old, which tests of the lease itself do.
    client.delete_object(Bucket=BUCKET, Key="records/taken/lease.json")
    user.run(*command("second"))
    second = tmp_path / "second"
    restored = {path.name for path in (second / "records" / "restored").iterdir()}
    assert restored >= safe, "what was at the target was made again"
    undisturbed = tmp_path / "undisturbed"
    source = f"hf://{REPO}@{commit}"
    user.run("convert", "--source", source, "--recipe", quick, "--output", undisturbed)
    assert digests(second / "checkpoint") == digests(undisturbed)
