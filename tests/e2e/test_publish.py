"""Publishing as a user runs it: Hub, S3 and a folder at once, shards let go, one target failing."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from glm_quant.artifact import sha256_file
from glm_quant.data import tiny_glm_path
from tests.e2e.command_line import CommandLine
from tests.hub_server import Fault, HubServer
from tests.s3_server import KEYS, connect

TOKEN = "hf_PlantedTokenOfThePublishing"
SECRET = KEYS["AWS_SECRET_ACCESS_KEY"]


@pytest.fixture
def place() -> Iterator[HubServer]:
    with HubServer(token=TOKEN) as running:
        yield running


def contents(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): sha256_file(path) for path in paths}


@pytest.mark.slow
def test_three_targets_one_of_which_fails_at_first(
    server: object,
    cli: CommandLine,
    quick: Path,
    tmp_path: Path,
    place: HubServer,
    s3_url: str,
) -> None:
    """The others are done; the run ends failed and says which; again, only that one is left.

    With `keep_local: false` shards leave the disk while the conversion goes on and are fetched back
    for parity. No secret is in any file.
    """
    recipe, workspace = tmp_path / "quick.yaml", tmp_path / "work"
    recipe.write_text(f"{quick.read_text()}  keep_local: false\n  private: true\n")
    user = cli.with_variables(KEYS)
    user.environment |= {"HF_ENDPOINT": place.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    user.environment |= {"AWS_ENDPOINT_URL": s3_url, "AWS_DEFAULT_REGION": "us-east-1"}
    targets = ("hf://org/tiny", "s3://models/tiny", str(tmp_path / "published"))
    build = ("--source", tiny_glm_path(), "--workspace", workspace)
    command = ("run", recipe, *build, *(word for t in targets for word in ("--publish", t)))
    place.fault(Fault("status", "/commit/main", times=1, status=402))
    failed = user.run(*command, expect=1)
    assert "1 of 3 targets failed" in failed.stderr
    assert "hf://org/tiny" in failed.stderr
    assert {path.name for path in (workspace / "records" / "restored").iterdir()} == {
        f"{path.name}.json" for path in (workspace / "checkpoint").glob("*.safetensors")
    }
    assert place.repos["org/tiny"].private
    assert set(place.repos["org/tiny"].commits[place.repos["org/tiny"].branches["main"]]) == {
        ".gitattributes"
    }
    shown = ("publish", workspace, "--to", "hf://org/tiny", "--dry-run", "--json")
    planned = json.loads(user.run(*shown).stdout)["hf://org/tiny"]
    before = len(place.requests("^/lfs/put"))
    done = json.loads(user.run(*command, "--json").stdout)
    checkpoint = contents(workspace / "checkpoint")
    assert {change["name"] for change in planned["added"]} == set(checkpoint)
    assert done["published"] == list(targets)
    sent = {request.path.split("/")[-2] for request in place.requests("^/lfs/put")[before:]}
    shards = {d for name, d in checkpoint.items() if name.endswith(".safetensors")}
    assert not sent & shards
    repo = place.repos["org/tiny"]
    visible = repo.commits[repo.branches["main"]]
    assert {n: f.sha256 for n, f in visible.items() if n != ".gitattributes"} == checkpoint
    assert list(repo.branches) == ["main"]
    assert contents(tmp_path / "published") == checkpoint
    client = connect(s3_url, seconds=20)
    latest = json.loads(client.get_object(Bucket="models", Key="tiny/LATEST")["Body"].read())
    assert {file["path"]: file["sha256"] for file in latest["files"]} == checkpoint
    for folder in (workspace, cli.prefect_home, tmp_path / "published"):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                data = path.read_bytes()
                assert TOKEN.encode() not in data, path
                assert SECRET.encode() not in data, path
    assert os.environ.get("HF_TOKEN") is None
