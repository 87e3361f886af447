"""A build is never made over another one unasked."""

import hashlib
import shutil
from pathlib import Path

import pytest

from tests.conftest import run_command
from tests.plain import PLAIN


def contents(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


@pytest.fixture
def others_recipe(tmp_path: Path) -> Path:
    """The same rules under another name."""
    path = tmp_path / "others.yaml"
    path.write_text(Path(PLAIN).read_text().replace("name: plain", "name: others"))
    return path


def test_a_finished_build_is_replaced_only_by_word(
    small_copy: Path, tmp_path: Path, others_recipe: Path
) -> None:
    """Another recipe, or another source, into the same output is refused with both names.

    `--replace` makes it; an edit of the same recipe needs no word and makes only what changed.
    """
    output = tmp_path / "converted"
    place = ("--source", small_copy, "--output", output)
    run_command("convert", "--recipe", PLAIN, *place)
    before = contents(output)
    refused = run_command("convert", "--recipe", others_recipe, *place, expect=2).stderr
    assert "here stands another build, plain of small-glm (finished)" in refused
    assert "asked for is others of small-glm" in refused
    assert "--replace" in refused
    renamed = shutil.copytree(small_copy, tmp_path / "fine-tuned")
    other_source = ("--source", renamed, "--output", output)
    refused = run_command("convert", "--recipe", PLAIN, *other_source, expect=2).stderr
    assert "asked for is plain of fine-tuned" in refused
    beside = tmp_path / ".converted.glm-quant"
    run = ("run", others_recipe, "--source", small_copy, "--workspace", beside)
    refused = run_command(*run, expect=2).stderr
    assert "plain of small-glm" in refused
    refused = run_command("demo", "--workspace", beside, expect=2).stderr
    assert "asked for is demo of tiny-glm" in refused
    assert contents(output) == before
    edited = tmp_path / "edited.yaml"
    edited.write_text(Path(PLAIN).read_text().replace("description:", "description: edited,"))
    run_command("convert", "--recipe", edited, *place)
    shards = {name: digest for name, digest in before.items() if name.endswith(".safetensors")}
    assert contents(output).items() >= shards.items()
    run_command("convert", "--recipe", others_recipe, *place, "--replace")
    assert '"name": "others"' in (output / "manifest.json").read_text()


def test_default_workspace_is_named_by_source_and_recipe(release: Path, tmp_path: Path) -> None:
    """Two recipes of one source never meet in one folder because nobody named one."""
    source = shutil.copytree(release, tmp_path / "GLM-5.2")
    for recipe in ("dynamic-2.56bpw", "uniform-4bit"):
        run_command("run", recipe, "--source", source, folder=tmp_path, expect=2)
    places = {path.name for path in (tmp_path / "workspace").iterdir()}
    assert places == {"GLM-5.2-dynamic-2.56bpw", "GLM-5.2-uniform-4bit"}


def test_a_source_in_a_folder_that_is_emptied(small: Path, tmp_path: Path) -> None:
    """A source that lies where fetched shards would be deleted is refused, not deleted."""
    workspace = tmp_path / "work"
    source = shutil.copytree(small, workspace / "source" / "small-glm")
    (workspace / ".lock").touch()
    (workspace / "records").mkdir()
    run = ("run", PLAIN, "--source", source, "--workspace", workspace)
    assert "the source lies in" in run_command(*run, expect=2).stderr
    assert contents(source) == contents(small)
