"""Whatever stops a conversion, the same command again gives the same bytes, and only what is left.

Processes that are killed are in test_crash.py; here is what they may leave behind.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import IntegrityError
from glm_quant.quantize.convert import Conversion
from glm_quant.quantize.verify import verify
from glm_quant.recipe import Recipe, Rule

from ..conftest import Edit, Made

Stamp = tuple[int, int]


def stamp(path: Path) -> Stamp:
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def expected(
    small: Path,
    tmp_path_factory: pytest.TempPathFactory,
    demo_recipe: Recipe,
    prepare: Callable[..., Made],
) -> dict[str, str]:
    """Give the shards of an uninterrupted run."""
    whole = prepare(small, tmp_path_factory.mktemp("whole"), demo_recipe)
    whole.complete_all()
    return contents(whole.output)


@pytest.fixture
def halfway(small: Path, tmp_path: Path, demo_recipe: Recipe, prepare: Callable[..., Made]) -> Made:
    """Give a conversion that stopped after some output shards, with the next one begun."""
    stopped = prepare(small, tmp_path / "work", demo_recipe)
    stopped.workspace.create()
    for shard in range(len(stopped.plan.shards)):
        stopped.conversion.complete(shard)
        if pieces_of(stopped, shard + 1):
            break
    assert 0 < begun(stopped) < len(stopped.plan.shards)
    return stopped


def begun(made: Made) -> int:
    """Return the shard that is begun and not finished."""
    (name,) = (path.stem for path in made.workspace.partial.glob("*.part"))
    return [shard.name for shard in made.plan.shards].index(name)


def partial_of(made: Made) -> Path:
    return made.workspace.partial / f"{made.plan.shards[begun(made)].name}.part"


def journal_of(made: Made) -> Path:
    return made.workspace.partial / "journal.jsonl"


def pieces_of(made: Made, shard: int) -> list[tuple[str, int]]:
    """Return tensor and offset of the pieces that were journaled for a shard."""
    entries = [json.loads(line) for line in journal_of(made).read_text().splitlines()[1:]]
    return [(piece[0], piece[2]) for entry in entries for piece in entry[2] if piece[1] == shard]


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def test_last_shard_first(
    small: Path,
    tmp_path: Path,
    demo_recipe: Recipe,
    prepare: Callable[..., Made],
    expected: dict[str, str],
) -> None:
    """Shards may be completed in any order."""
    made = prepare(small, tmp_path, demo_recipe)
    made.workspace.create()
    for shard in reversed(range(len(made.plan.shards))):
        made.conversion.complete(shard)
    assert contents(made.output) == expected


def test_journaled_work_is_not_done_again(halfway: Made, expected: dict[str, str]) -> None:
    """A resumed run reads only the source bytes whose jobs were not journaled."""
    done = sum(1 for line in journal_of(halfway).read_text().splitlines()[1:] if line)
    totals: list[int] = []
    halfway.conversion.complete(begun(halfway), lambda _, total: totals.append(total))
    assert done > 0
    assert totals
    source_bytes = sum(info.size_bytes for info in halfway.checkpoint.tensors.values())
    assert totals[-1] < source_bytes
    halfway.complete_all()
    assert contents(halfway.output) == expected


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_torn_journal_line(halfway: Made, expected: dict[str, str], cut: int) -> None:
    """A last line of the journal that was cut, even by its newline alone, costs only that job."""
    with journal_of(halfway).open("r+b") as file:
        file.truncate(journal_of(halfway).stat().st_size - cut)
    halfway.conversion.complete(begun(halfway))
    lines = journal_of(halfway).read_text().splitlines()
    assert all(json.loads(line) for line in lines)
    halfway.complete_all()
    assert contents(halfway.output) == expected


@pytest.mark.parametrize("content", [b"", b"garbage\n", b'{"plan": "another"}\n'])
def test_journal_of_another_plan(halfway: Made, expected: dict[str, str], content: bytes) -> None:
    """A journal that is empty or of another plan is not used, and neither are its partials."""
    journal_of(halfway).write_bytes(content)
    halfway.complete_all()
    assert contents(halfway.output) == expected


def test_deleted_partial(halfway: Made, expected: dict[str, str]) -> None:
    """A partial shard that is gone is made again, whatever the journal says."""
    partial_of(halfway).unlink()
    halfway.complete_all()
    assert contents(halfway.output) == expected


def test_truncated_partial(halfway: Made, expected: dict[str, str]) -> None:
    """A partial shard of the wrong size is made again."""
    os.truncate(partial_of(halfway), partial_of(halfway).stat().st_size // 2)
    halfway.complete_all()
    assert contents(halfway.output) == expected


def test_partial_without_its_header(halfway: Made, expected: dict[str, str]) -> None:
    """A crash between making a partial file and writing its header does no harm."""
    with partial_of(halfway).open("r+b") as file:
        file.write(b"\0" * len(halfway.plan.shards[begun(halfway)].header))
    halfway.complete_all()
    assert contents(halfway.output) == expected


def test_flipped_bit_in_a_partial(halfway: Made, expected: dict[str, str]) -> None:
    """A bit that changes before a shard is finished is noticed; the next run heals it."""
    shard = begun(halfway)
    name = halfway.plan.shards[shard].name
    tensor, offset = pieces_of(halfway, shard)[0]
    flip(partial_of(halfway), offset)
    with pytest.raises(IntegrityError) as raised:
        halfway.conversion.complete(begun(halfway))
    said = str(raised.value)
    for part in (name, f"tensor {tensor} changed on disk", "run again"):
        assert part in said
    assert not (halfway.output / name).exists()
    halfway.complete_all()
    assert contents(halfway.output) == expected


def test_flipped_bit_in_the_journal(halfway: Made, expected: dict[str, str]) -> None:
    """A job whose key changed in the journal is done again, and nothing fails."""
    lines = journal_of(halfway).read_text().splitlines(keepends=True)
    at = next(
        i for i, line in enumerate(lines[1:], 1) if json.loads(line)[2][0][1] == begun(halfway)
    )
    lines[at] = lines[at].replace("model.layers", "modem.layers", 1)
    assert "modem" in lines[at]
    journal_of(halfway).write_text("".join(lines))
    halfway.complete_all()
    assert contents(halfway.output) == expected


def test_killed_between_the_rename_and_the_record(
    halfway: Made, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that has its name and no record yet is checked and recorded, not made again."""
    shard = begun(halfway)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("glm_quant.quantize.records.ShardRecord.save", die)
        with pytest.raises(KeyboardInterrupt):
            halfway.conversion.complete(shard)
    path = halfway.output / halfway.plan.shards[shard].name
    inode = path.stat().st_ino
    assert halfway.conversion.outputs.finished(shard) is None
    told: list[int] = []
    halfway.conversion.complete(shard, lambda _, total: told.append(total))
    assert not told, "its source was read again"
    assert path.stat().st_ino == inode
    halfway.complete_all()
    assert contents(halfway.output) == expected


def test_deleted_finished_shard(made: Made) -> None:
    """Of a finished build, only a shard that is gone is made again."""
    before = {path: stamp(path) for path in made.shard_files}
    whole = contents(made.output)
    gone = made.shard_files[2]
    gone.unlink()
    made.complete_all()
    made.assemble()
    assert contents(made.output) == whole
    changed = [path for path in made.shard_files if stamp(path) != before[path]]
    assert changed == [gone]


def test_flipped_bit_in_a_finished_shard(made: Made) -> None:
    """verify names the shard and both digests; without the file, the next run makes it again."""
    whole = contents(made.output)
    broken = made.shard_files[1]
    flip(broken, broken.stat().st_size - 5)
    with pytest.raises(IntegrityError, match=rf"{broken.name}: the record says sha256 "):
        verify(made.output)
    broken.unlink()
    made.complete_all()
    made.assemble()
    assert contents(made.output) == whole
    verify(made.output)


def test_edited_recipe(made: Made, prepare: Callable[..., Made]) -> None:
    """After an edit of one rule only the shards that hold such weights are made again."""
    before = {path: stamp(path) for path in made.shard_files}
    rules = tuple(
        Rule(group="indexer", dtype="bfloat16") if rule.group == "indexer" else rule
        for rule in made.recipe.rules
    )
    source = Path(made.checkpoint.source.uri)
    recipe = made.recipe.model_copy(update={"rules": rules})
    edited = prepare(source, made.workspace.root, recipe)
    edited.complete_all()
    edited.assemble()
    with_indexer = [
        edited.output / shard.name
        for shard in edited.plan.shards
        if any(".indexer." in tensor.name for tensor in shard.tensors)
    ]
    assert 0 < len(with_indexer) < len(edited.plan.shards)
    assert [p for p in edited.shard_files if stamp(p) != before[p]] == with_indexer
    fresh = prepare(source, made.workspace.root.with_name("fresh"), recipe)
    fresh.complete_all()
    fresh.assemble()
    assert contents(edited.output) == contents(fresh.output)


def test_changed_source(
    made: Made, prepare: Callable[..., Made], edit_tensor: Callable[[Path, str, Edit], str]
) -> None:
    """After a change of one source shard only the outputs that draw on it are made again."""
    before = {path: stamp(path) for path in made.shard_files}
    source = Path(made.checkpoint.source.uri)

    def negate(values: "object") -> None:
        values[:] = values ^ 0x8000  # type: ignore[index,operator]

    shard = edit_tensor(source, "model.layers.2.mlp.experts.3.up_proj.weight", negate)
    again = prepare(source, made.workspace.root, made.recipe)
    again.complete_all()
    again.assemble()
    drawn = [
        again.output / planned.name
        for i, planned in enumerate(again.plan.shards)
        if (record := again.conversion.outputs.finished(i)) and shard in record.inputs.sources
    ]
    assert 0 < len(drawn) < len(again.plan.shards)
    assert [p for p in again.shard_files if stamp(p) != before[p]] == drawn
    fresh = prepare(source, made.workspace.root.with_name("fresh"), made.recipe)
    fresh.complete_all()
    fresh.assemble()
    assert contents(again.output) == contents(fresh.output)


def test_leftovers_of_a_killed_run_are_removed(made: Made) -> None:
    """Temporary files of a killed run and shards of an earlier plan do not stay in the build."""
    whole = contents(made.output)
    (made.output / ".config.json.4711.part").write_bytes(b"torn")
    shutil.copy(made.shard_files[0], made.output / "model-00001-of-00099.safetensors")
    made.assemble()
    assert contents(made.output) == whole


def test_a_copied_source_keeps_what_was_made(made: Made, edit_tensor: Callable[..., str]) -> None:
    """Same bytes with new times of change: no shard is made again; a changed byte is noticed."""
    stamps = {path.name: path.stat().st_mtime_ns for path in made.shard_files}
    source = Path(made.checkpoint.source.uri)
    for path in source.iterdir():
        os.utime(path, (1, 1))
    again = Conversion(Checkpoint.open(source), made.plan, made.workspace, 1)
    assert again.outputs.unfinished() == list(range(len(made.plan.shards)))
    for shard in range(len(made.plan.shards)):
        again.complete(shard)
    assert {path.name: path.stat().st_mtime_ns for path in made.shard_files} == stamps
    edit_tensor(source, "model.norm.weight", lambda values: values.__setitem__(0, values[0] ^ 1))
    changed = Conversion(Checkpoint.open(source), made.plan, made.workspace, 1)
    for shard in range(len(made.plan.shards)):
        changed.complete(shard)
    after = {path.name: path.stat().st_mtime_ns for path in made.shard_files}
    assert 0 < sum(after[name] != stamps[name] for name in stamps) < len(stamps)
