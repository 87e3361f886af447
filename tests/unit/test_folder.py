"""Publishing to a folder: all at once or not at all, and nothing of anybody else's is touched."""

import hashlib
from pathlib import Path

import pytest

from glm_quant.artifact import FileDigest
from glm_quant.errors import IntegrityError, PublishError
from glm_quant.hub.folder import FolderTarget, exchange
from glm_quant.hub.target import Published
from glm_quant.quantize.verify import verify

from ..conftest import Made, leave_litter


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def publish_to_folder(build: Path, target: Path) -> Published:
    files = [FileDigest.of(build, name) for name in contents(build)]
    return FolderTarget(target, "abc").publish(build, files)


def test_copy_is_whole(made: Made, tmp_path: Path) -> None:
    """The target has every file of the build; weights share the disk's blocks."""
    target = tmp_path / "deep" / "published"
    published = publish_to_folder(made.output, target)
    assert contents(target) == contents(made.output)
    assert [change.name for change in published.diff.added] == sorted(contents(target))
    assert target.joinpath(made.shard_files[0].name).samefile(made.shard_files[0])
    assert [path.name for path in target.parent.iterdir()] == ["published"]


def test_earlier_build_is_replaced(made: Made, tmp_path: Path) -> None:
    """A build of ours at the target is replaced whole; an empty folder is taken."""
    target = tmp_path / "published"
    target.mkdir()
    publish_to_folder(made.output, target)
    stale = "model-00009-of-00009.safetensors"
    (target / stale).write_bytes(b"of an earlier build")
    diff = publish_to_folder(made.output, target).diff
    assert contents(target) == contents(made.output)
    assert [change.name for change in diff.deleted] == [stale]
    assert (diff.added, diff.changed) == ((), ())


def test_what_others_left_in_a_published_folder(made: Made, tmp_path: Path) -> None:
    """Litter is nobody's; a person's files outlive another build; weights of theirs are named."""
    target = tmp_path / "published"
    target.mkdir()
    leave_litter(target)
    publish_to_folder(made.output, target)
    leave_litter(target)
    (target / "notes" / "draft").mkdir(parents=True)
    for name in ("notes.txt", "notes/draft/run.log"):
        (target / name).write_text("a person's")
    diff = publish_to_folder(made.output, target).diff
    assert (diff.added, diff.changed, diff.deleted) == ((), (), ())
    assert (target / "notes.txt").read_text() == "a person's"
    assert (target / "notes" / "draft" / "run.log").read_text() == "a person's"
    verify(target)
    (target / "lora.safetensors").write_bytes(b"a person's")
    with pytest.raises(PublishError, match=r"lora\.safetensors: it is no shard of a build"):
        publish_to_folder(made.output, target)
    assert (target / "lora.safetensors").read_bytes() == b"a person's"


def test_leftovers_of_a_killed_run(made: Made, tmp_path: Path) -> None:
    """What a killed run left beside the target does not stop the next one, and does not stay."""
    target = tmp_path / "published"
    for name in (".published.abc.new", ".published.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_bytes(b"x")
    publish_to_folder(made.output, target)
    assert contents(target) == contents(made.output)
    assert not list(tmp_path.glob(".published.*"))


def test_foreign_target(made: Made, tmp_path: Path) -> None:
    """A folder or file that is no build of ours is refused and stays as it was."""
    target = tmp_path / "mine"
    target.mkdir()
    (target / "thesis.tex").write_text("x")
    with pytest.raises(PublishError, match=r"it holds something that is no build of glm-quant"):
        publish_to_folder(made.output, target)
    assert contents(tmp_path / "mine").keys() == {"thesis.tex"}
    with pytest.raises(PublishError, match="this is a file"):
        publish_to_folder(made.output, target / "thesis.tex")


def test_target_inside_the_build(made: Made) -> None:
    """The build itself, or a folder inside it, is no target."""
    for target in (made.output, made.output / "published"):
        with pytest.raises(PublishError, match=r"it is the build .* itself or lies inside it"):
            publish_to_folder(made.output, target)


def test_target_that_is_a_link(made: Made, tmp_path: Path) -> None:
    """A link to a folder is followed: the build appears where the link points."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for _ in range(2):
        publish_to_folder(made.output, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "disk") == contents(made.output)


def test_published_copy_outlives_the_workspace(made: Made, tmp_path: Path) -> None:
    """A shard that is made anew later does not change the published one."""
    target = tmp_path / "published"
    publish_to_folder(made.output, target)
    before = contents(target)
    made.shard_files[0].unlink()
    made.complete_all()
    assert contents(target) == before


def test_uploaded_shards_need_no_local_copy(made: Made, tmp_path: Path) -> None:
    """What waits in the hidden folder is taken from there; what is nowhere is named."""
    files = [FileDigest.of(made.output, name) for name in contents(made.output)]
    whole = contents(made.output)
    target = FolderTarget(tmp_path / "published", "abc")
    first, last = made.shard_files[0], made.shard_files[-1]
    target.upload(made.output, next(file for file in files if file.path == first.name))
    assert not (tmp_path / "published").exists()
    first.unlink()
    kept = last.rename(tmp_path / "kept")
    with pytest.raises(PublishError, match=f"{last.name}: the shard is neither here nor in"):
        target.publish(made.output, files)
    kept.rename(last)
    target.publish(made.output, files)
    assert contents(tmp_path / "published") == whole


def test_a_changed_file_is_not_published(made: Made, tmp_path: Path) -> None:
    """A file that is copied is held against its record; the target stays as it was."""
    files = [FileDigest.of(made.output, name) for name in contents(made.output)]
    config = made.output / "config.json"
    config.write_bytes(config.read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(IntegrityError, match=r"config\.json: the record says sha256"):
        FolderTarget(tmp_path / "published", "abc").publish(made.output, files)
    assert not (tmp_path / "published").exists()


def test_two_folders_change_places_in_one_step(tmp_path: Path) -> None:
    """Nobody finds the name taken by nothing; what does not exist is not exchanged."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "other").exists()
    assert (tmp_path / "other" / "one").exists()
    assert not exchange(tmp_path / "one", tmp_path / "nowhere")
