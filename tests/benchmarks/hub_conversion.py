"""Converting a checkpoint that stands nowhere: a loopback Hub makes its bytes while it sends them.

    uv run python tests/benchmarks/hub_conversion.py --experts 256 --window 2

The source has GLM-5.2's real dims: one MoE layer of `--experts`, embeddings, head, and an MTP layer
that the recipe drops. Reported: wall time, the converter's peak memory, what was on disk of the
source at most, and what was sent. Server and converter share the cores of one machine.
"""

import argparse
import bisect
import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from glm_quant.checkpoint.index import INDEX_NAME
from glm_quant.data import tiny_glm_path
from glm_quant.model.geometry import Geometry
from tests import synthetic
from tests.benchmarks.measuring import PROGRAM, measure
from tests.hub_server import Content, HubServer

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class VirtualShard:
    """A shard whose bytes are made when asked for, at any place."""

    def __init__(self, pack: list[Any], pool: np.ndarray) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._begins, self._pack, self._pool, end = [], pack, pool, 0
        for name, shape, kind in pack:
            self._begins.append(end)
            end += synthetic._bytes(shape, kind)
            dtype = synthetic._dtype(kind)
            span = [self._begins[-1], end]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self.payload, self.size = end, len(self._head) + end

    def read(self, begin: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from `begin` to `end`."""
        if begin < len(self._head):
            yield self._head[begin:end]
        begin, end = max(0, begin - len(self._head)), end - len(self._head)
        number = bisect.bisect_right(self._begins, begin) - 1
        while begin < end and number < len(self._pack):
            name, shape, kind = self._pack[number]
            position = self._begins[number]
            for block in synthetic._values(name, int(np.prod(shape)), kind, self._pool):
                data = memoryview(block).cast("B")
                first, last = max(0, begin - position), min(len(data), end - position)
                if first < last:
                    yield bytes(data[first:last])
                position += len(data)
                if position >= end:
                    return
            begin, number = max(begin, position), number + 1

    def content(self) -> Content:
        """Return it with its digest, which costs making it once."""
        digest = hashlib.sha256()
        for block in self.read(0, self.size):
            digest.update(block)
        return Content.generated(self.size, digest.hexdigest(), self.read)


def virtual_checkpoint(experts: int, shard_bytes: int) -> tuple[dict[str, Content], int]:
    """Return the files of a checkpoint, and the bytes of its weights."""
    config = synthetic.real_config(1, experts, dense=0)
    geometry = Geometry.from_config(config)
    entries = sorted([*geometry.tensors(), *geometry.mtp_tensors()])
    pool = synthetic._pool(0)
    packs = list(synthetic._pack(entries, shard_bytes))
    shards = [VirtualShard(pack, pool) for pack in packs]
    names = [f"model-{n:05d}-of-{len(packs):05d}.safetensors" for n in range(1, len(packs) + 1)]
    with ThreadPoolExecutor() as threads:
        files = dict(zip(names, threads.map(VirtualShard.content, shards), strict=True))
    weight_map = {e[0]: name for name, pack in zip(names, packs, strict=True) for e in pack}
    total = sum(shard.payload for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files["config.json"] = Content.of_bytes(json.dumps(config).encode())
    files[INDEX_NAME] = Content.of_bytes(json.dumps(index).encode())
    files |= {name: Content.of(tiny_glm_path() / name) for name in COMPANIONS}
    return files, sum(shard.size for shard in shards)


class Watch(threading.Thread):
    """Looks at the source folder of a workspace until it is told to stop."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.most_bytes = self.most_shards = 0
        self._folder = folder
        self._ended = threading.Event()

    def run(self) -> None:
        """Look."""
        while not self._ended.wait(0.01):
            sizes: dict[str, int] = {}
            for path in self._folder.glob("*.safetensors*"):
                if path.suffix != ".marks":
                    try:
                        sizes[path.name.removesuffix(".part")] = path.stat().st_size
                    except FileNotFoundError:
                        continue
            self.most_bytes = max(self.most_bytes, sum(sizes.values()))
            self.most_shards = max(self.most_shards, len(sizes))

    def stop(self) -> None:
        """End."""
        self._ended.set()
        self.join()


def convert_virtual(
    experts: int, window: int, recipe: str, shard_gib: float, work: Path | None
) -> dict[str, Any]:
    """Convert a checkpoint that stands nowhere.

    Args:
        experts: of its MoE layer.
        window: source shards on disk at a time.
        recipe: name or path.
        shard_gib: largest payload of a source shard.
        work: folder on the disk to use; default: the system's.

    Returns:
        What was measured.
    """
    folder = Path(tempfile.mkdtemp(prefix="hub-conversion-", dir=work))
    files, size = virtual_checkpoint(experts, int(shard_gib * 2**30))
    command = [PROGRAM, "convert", "--source", "hf://org/virtual", "--recipe", recipe]
    command += ["--output", str(folder / "build"), "--window", str(window)]
    try:
        with HubServer() as hub:
            hub.add_commit("org/virtual", files)
            watch = Watch(folder / ".build.glm-quant" / "source")
            watch.start()
            seconds, peak = measure(command, {"HF_ENDPOINT": hub.url})
            watch.stop()
            whole = {r.file for r in hub.requests("^/cdn/") if r.range is None}
        fetched = sum(files[name].size for name in whole)
        made = sum(path.stat().st_size for path in (folder / "build").iterdir())
        return {
            "source_gb": round(size / 1e9, 3),
            "source_shards": sum(name.endswith(".safetensors") for name in files),
            "fetched_gb": round(fetched / 1e9, 3),
            "output_gb": round(made / 1e9, 3),
            "window": window,
            "most_shards_on_disk": watch.most_shards,
            "most_source_gb_on_disk": round(watch.most_bytes / 1e9, 3),
            "wall_seconds": round(seconds, 1),
            "fetched_mb_per_second": round(fetched / 1e6 / seconds, 1),
            "peak_rss_gb": round(peak / 1e9, 3),
        }
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Measure and print one JSON value."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--window", type=int, default=2)
    parser.add_argument("--recipe", default="uniform-4bit")
    parser.add_argument("--shard-gib", type=float, default=5.0)
    parser.add_argument("--folder", type=Path, help="default: a new one under the system's")
    options = parser.parse_args()
    report = convert_virtual(
        options.experts, options.window, options.recipe, options.shard_gib, options.folder
    )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
