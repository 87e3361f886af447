"""A build of a branch that moves: what was begun goes on with its commit until it is finished."""

import hashlib
import json
from collections.abc import Generator
from functools import partial
from pathlib import Path

import pytest

from glm_quant.build import Build, BuildSpec, claimed, require_free
from glm_quant.convert import convert_to_folder, open_conversion
from glm_quant.errors import SourceError
from glm_quant.hub.huggingface import HubSource
from glm_quant.hub.retry import Patience
from glm_quant.workspace import Workspace
from tests.hub_server import HubServer
from tests.synthetic import small_config, write_checkpoint

REPO = "org/moving"


class Silent:
    def begin(self, stage: str) -> None: ...

    def move(self, stage: str, done: int, total: int) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Generator[HubServer]:
    with HubServer() as server:
        here = partial(HubSource, endpoint=server.url, patience=Patience(tries=3))
        monkeypatch.setattr("glm_quant.hub.pin.HubSource", here)
        yield server


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "moving.yaml"
    path.write_text(
        "name: moving\ndescription: experts in 2 bits\nshard_bytes: 300_000\nrules:\n"
        "  - group: routed_experts\n    bits: 2\n"
        "  - group: mtp\n    drop: true\n"
        "  - match: .\n    dtype: source\n"
    )
    return path


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "newer", small_config(), shard_bytes=190_000, seed=1)
    return tmp_path / "newer"


def opened(uri: str, recipe: Path, output: Path) -> Build:
    return open_conversion(uri, str(recipe), output, 1)


def weights(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.safetensors"))
    }


@pytest.mark.parametrize("uri", [f"hf://{REPO}", f"hf://{REPO}@main"])
def test_a_build_that_was_begun_goes_on_with_its_commit(
    hub: HubServer, small: Path, newer: Path, recipe: Path, tmp_path: Path, uri: str
) -> None:
    """The branch moves after the first output shard; only after the end a new build sees that."""
    first = hub.add_folder(REPO, small)
    plain = opened(str(small), recipe, tmp_path / "plain")
    convert_to_folder(plain, Silent())

    output = tmp_path / "build"
    begun = opened(uri, recipe, output)
    begun.workspace.create()
    begun.conversion.complete(0)
    begun.close()
    second = hub.add_folder(REPO, newer)
    goes_on = opened(uri, recipe, output)
    assert goes_on.checkpoint.source.uri == f"hf://{REPO}@{first}"
    assert goes_on.conversion.outputs.finished(0) is not None
    convert_to_folder(goes_on, Silent())
    assert weights(output) == weights(tmp_path / "plain")
    manifest = json.loads((output / "manifest.json").read_bytes())
    assert manifest["source"] == f"hf://{REPO}@{first}"

    anew = opened(uri, recipe, output)
    assert anew.checkpoint.source.uri == f"hf://{REPO}@{second}"
    convert_to_folder(anew, Silent())
    assert weights(output).keys() == weights(tmp_path / "plain").keys()
    assert weights(output) != weights(tmp_path / "plain")


def test_another_revision_overrides_and_a_lost_commit_is_named(
    hub: HubServer, small: Path, newer: Path, recipe: Path, tmp_path: Path
) -> None:
    """An explicit commit is taken; a recorded commit that is gone says which file to delete."""
    output = tmp_path / "build"
    first = hub.add_folder(REPO, small)
    begun = opened(f"hf://{REPO}", recipe, output)
    assert not begun.workspace.pin.exists(), "nothing is recorded before the lock is held"
    begun.workspace.create()
    begun.conversion.complete(0)
    begun.close()
    second = hub.add_folder(REPO, newer)
    explicit = opened(f"hf://{REPO}@{second}", recipe, output)
    assert explicit.checkpoint.source.uri.endswith(second)
    del hub.repos[REPO].commits[first]
    with pytest.raises(SourceError, match=f"no revision {first}.*delete that file") as raised:
        opened(f"hf://{REPO}", recipe, output)
    assert str(begun.workspace.pin) in str(raised.value)
    begun.workspace.pin.write_bytes(b"{")
    assert opened(f"hf://{REPO}", recipe, output).checkpoint.source.uri.endswith(second)


def test_a_flow_keeps_the_commit_until_it_ends_well(small: Path, tmp_path: Path) -> None:
    """A look at a workspace and a run that fails leave the record; success ends it."""
    spec = BuildSpec(recipe="demo", source=str(small), workspace=str(tmp_path / "work"))
    pin = Workspace(tmp_path / "work").pin
    with claimed(spec):
        pin.parent.mkdir()
    pin.touch()
    require_free(spec)
    with pytest.raises(SourceError), claimed(spec):
        raise SourceError("the network is away")
    assert pin.exists()
    with claimed(spec):
        pass
    assert not pin.exists()
