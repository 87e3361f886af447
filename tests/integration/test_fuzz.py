"""Hostile headers and indexes, 1,500 of them: an error of ours or a valid reading, nothing else.

Made from valid ones by one to three lies each, from fixed seeds. Some go through the whole command.
"""

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from glm_quant.checkpoint.header import ITEM_SIZE, TensorInfo, header_length, parse_header
from glm_quant.checkpoint.index import INDEX_NAME, parse_index
from glm_quant.errors import CheckpointError
from tests.plain import PLAIN

SHARD = "model-00002-of-00029.safetensors"
HEADERS, INDEXES = 1_000, 500

NUMBERS = [-1, -(2**63), 2**31, 2**48, 2**63, 2**64 - 1, 2**200, 0.5, 1e308, math.nan, math.inf]
ODD = [*NUMBERS, None, True, "", "7", [], {}, [[1]], {"a": 1}, "x" * 9_000]
NAMES = [
    "",
    ".",
    "..",
    "../../etc/passwd",
    "../model.safetensors",
    "/etc/cron.d/model.safetensors",
    "sub/model.safetensors",
    "..\\model.safetensors",
    "C:\\model.safetensors",
    "\\\\host\\share\\model.safetensors",
    "CON.safetensors/x",
    "~/model.safetensors",
    "$(touch x).safetensors",
    "model.safetensors\n",
    "a\0b.safetensors",
    "\ud800.safetensors",
    "\u202egpj.safetensors",
    "\x1b[2J.safetensors",
    "m" * 20_000 + ".safetensors",
    "model.bin",
    ".hidden.safetensors",
    "__metadata__",
]

# An object as a list of pairs, so that names may occur twice.
Pairs = list[tuple[str, Any]]


def dump(value: Any) -> str:
    """Write JSON, with an object for each list of pairs."""
    if isinstance(value, list) and value and all(isinstance(v, tuple) for v in value):
        return "{" + ",".join(f"{json.dumps(k)}:{dump(v)}" for k, v in value) + "}"
    return json.dumps(value)


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


def spoil_text(text: str, chance: random.Random) -> bytes:
    """Lie on the level of characters and bytes."""
    at = chance.randrange(len(text))
    return chance.choice(
        [
            lambda: text[:at].encode(),
            lambda: text.encode() + b"\0garbage",
            lambda: b"\xef\xbb\xbf" + text.encode(),
            lambda: text.encode("utf-16"),
            lambda: text.encode()[:at] + b"\xff\xfe" + text.encode()[at:],
            lambda: (text[:-1] + f',"deep":{deep(chance.choice((50, 990, 100_000)))}}}').encode(),
            lambda: (text[:-1] + f',"n":{"9" * 5_000}}}').encode(),
            lambda: text.replace(
                "0", chance.choice(("NaN", "-Infinity", "1e999", "0x0")), 1
            ).encode(),
            lambda: text.replace('"', "'").encode(),
            lambda: (" " * 5_000 + text + "\n" * 5_000).encode(),
            lambda: deep(200_000).encode(),
            lambda: b"",
        ]
    )()


def hostile_header(chance: random.Random) -> tuple[bytes, int]:
    """Return a header that lies, and the size of its file."""
    pairs: Pairs = [("__metadata__", {"format": "pt"})]
    end = 0
    for number in range(chance.randint(1, 5)):
        dtype, shape = (
            chance.choice(sorted(ITEM_SIZE)),
            [chance.randint(1, 4), chance.randint(1, 9)],
        )
        begin, end = end, end + math.prod(shape) * ITEM_SIZE[dtype]
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        pairs.append((f"model.layers.{number}.weight", entry))
    payload = end
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(pairs))
        name, entry = pairs[at]
        lie = chance.randrange(9)
        if lie == 0:
            pairs[at] = (chance.choice(NAMES), entry)
        elif lie == 1:
            pairs.append(pairs[chance.randrange(len(pairs))])
        elif lie == 2:
            pairs[at] = (name, chance.choice(ODD))
        elif lie == 3:
            payload += chance.choice((-1, 1, 8, 2**40))
        elif isinstance(entry, dict) and "shape" in entry:
            key = chance.choice(("dtype", "shape", "data_offsets"))
            value = entry[key]
            if isinstance(value, list) and lie < 7:
                value = list(value)
                value[chance.randrange(len(value))] = chance.choice(
                    [*ODD, 0, 1, payload, payload + 1]
                )
            else:
                value = chance.choice([*ODD, "bf16", "F4", "F8_E8M0", [4, 0], [0], [0, 4, 8]])
            pairs[at] = (name, {**entry, key: value})
    text = dump(pairs)
    data = spoil_text(text, chance) if chance.random() < 0.25 else text.encode()
    return data, max(8 + len(data) + payload, 0)


def hostile_index(chance: random.Random, weight_map: dict[str, str]) -> bytes:
    """Return an index that lies."""
    pairs: Pairs = chance.sample(list(weight_map.items()), 20)
    metadata: Any = {"total_size": 5_000}
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(pairs))
        lie = chance.randrange(5)
        if lie == 0:
            pairs[at] = (pairs[at][0], chance.choice(NAMES))
        elif lie == 1:
            pairs[at] = (pairs[at][0], chance.choice(ODD))
        elif lie == 2:
            pairs[at] = (chance.choice(NAMES), pairs[at][1])
        elif lie == 3:
            pairs.append((pairs[at][0], pairs[at - 1][1]))
        else:
            metadata = chance.choice([*ODD, {"total_size": chance.choice(ODD)}])
    whole: Any = [("metadata", metadata), ("weight_map", pairs)]
    if chance.random() < 0.1:
        whole = chance.choice([[("weight_map", odd)] for odd in ODD])
    text = dump(whole)
    return spoil_text(text, chance) if chance.random() < 0.25 else text.encode()


def refusal(read: Callable[[], Any]) -> tuple[Any, str]:
    """Return what was read, or what was said against it, which a terminal can show."""
    try:
        return read(), ""
    except CheckpointError as error:
        said = str(error)
        assert said.isprintable()
        assert len(said) < 500
        return None, said


def check_tiling(tensors: Iterable[TensorInfo], begin: int, end: int) -> None:
    """Hold that tensors cover a file's payload without holes, each as its shape says."""
    for tensor in sorted(tensors, key=lambda t: (t.begin, t.end)):
        assert tensor.begin == begin
        assert tensor.size_bytes == math.prod(tensor.shape) * ITEM_SIZE[tensor.dtype]
        begin = tensor.end
    assert begin == end


def test_hostile_headers() -> None:
    """Each is refused with the shard's name, or its tensors tile the file."""
    refused = 0
    for seed in range(HEADERS):
        text, size = hostile_header(random.Random(seed))
        found, said = refusal(lambda text=text, size=size: parse_header(text, SHARD, size))
        if said:
            assert said.startswith(SHARD), seed
            refused += 1
        else:
            check_tiling(found.values(), 8 + len(text), size)
    assert HEADERS * 0.6 < refused < HEADERS, "the lies are all caught, or none is one"


def test_hostile_header_lengths() -> None:
    """Any eight bytes: refused, or a length that lies inside the file."""
    chance = random.Random(1)
    for _ in range(HEADERS):
        first = chance.randbytes(chance.choice((0, 3, 7, 8, 8, 8)))
        first = bytes(4 * chance.randint(0, 1)) + first if chance.random() < 0.5 else first
        first = first[:2] + bytes(6) if chance.random() < 0.3 else first
        size = len(first) + chance.choice((0, 1, 100, 1 << 20))
        found, said = refusal(lambda first=first, size=size: header_length(first, SHARD, size))
        assert said or 0 <= found <= size - 8


def test_hostile_indexes(small: Path) -> None:
    """Each is refused by name, or every shard in it is a plain name of this folder."""
    weight_map = parse_index((small / INDEX_NAME).read_bytes()).weight_map
    refused = 0
    for seed in range(INDEXES):
        text = hostile_index(random.Random(seed), weight_map)
        found, said = refusal(lambda text=text: parse_index(text))
        if said:
            assert said.startswith(INDEX_NAME), seed
            refused += 1
            continue
        for shard in found.shards:
            assert PurePosixPath(shard).parts == PureWindowsPath(shard).parts == (shard,)
            assert not shard.startswith(".")
    assert INDEXES * 0.3 < refused < INDEXES


def snapshot(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.lstat().st_size for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("what", ["header", "index"])
def test_the_whole_command(small: Path, tmp_path: Path, what: str) -> None:
    """`convert` refuses it with exit code 2, and makes no file anywhere but in its workspace."""
    source = tmp_path / "around" / "source"
    source.mkdir(parents=True)
    for path in small.iterdir():
        os.link(path, source / path.name)
    weight_map = parse_index((small / INDEX_NAME).read_bytes()).weight_map
    target = source / (SHARD if what == "header" else INDEX_NAME)
    options = ["convert", "--source", str(source), "--recipe", PLAIN]
    options += ["--output", str(tmp_path / "around" / "out" / "build")]
    for seed in range(12):
        chance = random.Random(seed)
        data = hostile_index(chance, weight_map)
        if what == "header":
            text, size = hostile_header(chance)
            data = len(text).to_bytes(8, "little") + text + bytes(min(size, 1000))
        target.unlink()
        target.write_bytes(data)
        before = snapshot(tmp_path)
        done = CliRunner().invoke(app, options)
        assert done.exit_code == 2, (seed, done.stderr, done.exception)
        assert isinstance(done.exception, SystemExit)
        assert "Error" in done.stderr
        assert snapshot(tmp_path) == before, seed


MEASURE = """
import json, resource, sys
from pathlib import Path
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import CheckpointError
unit = 1 if sys.platform == "darwin" else 1024
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
before, said = peak(), ""
try:
    Checkpoint.open(Path(sys.argv[1])).tensors
except CheckpointError as error:
    said = str(error)
print(json.dumps([peak() - before, said]))
"""


def fill(path: Path, begin: str, unit: str, end: str, size: int) -> None:
    """Write text of some size without holding it."""
    with path.open("w") as file:
        file.write(begin)
        for _ in range(size // (len(unit) * 1000)):
            file.write(unit * 1000)
        file.write(end)


@pytest.mark.parametrize(
    ("name", "begin", "unit", "end", "size"),
    [
        (INDEX_NAME, '{"weight_map":{"a":"', "x", '"}}', 100_000_000),
        (INDEX_NAME, '{"weight_map":[', "[],", "[]]}", 60_000_000),
        ("config.json", '{"model_type":"', "x", '"}', 100_000_000),
        ("config.json", '{"a":[', "{},", "{}]}", 16_000_000),
        (SHARD, "", "[],", "", 16_000_000),
        (SHARD, "", '"a":"",', "", 16_000_000),
    ],
    ids=["index", "lists in an index", "config", "objects in a config", "lists", "strings"],
)
def test_memory_is_bounded(
    small: Path, tmp_path: Path, name: str, begin: str, unit: str, end: str, size: int
) -> None:
    """100 MB of JSON, or less with millions of values: refused within 150 MB of memory."""
    for path in small.iterdir():
        if path.name != name:
            os.link(path, tmp_path / path.name)
    fill(tmp_path / name, begin, unit, end, size)
    if name == SHARD:
        text = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(len(text).to_bytes(8, "little") + text)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], check=True, capture_output=True, text=True
    )
    grown, said = json.loads(done.stdout)
    assert name in said
    assert grown < 150_000_000, f"{grown:,} bytes"
