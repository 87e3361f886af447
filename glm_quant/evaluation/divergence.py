"""True KL divergence and perplexity of a build against its bf16 source, on any machine.

The source is streamed once for a token set and its final hidden states are kept (the *reference
record*); then each build is streamed over the same tokens, and both are taken to logits part by
part of the vocabulary. With the hidden states and the source's output head the logits are exact, so
nothing is cut off to the top few. The reference is keyed by content
(the source's files, the tokens, the runtime, `VERSION`), so it may be shared between workspaces.
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from glm_quant import __version__
from glm_quant.artifact import FileDigest, require_space, sha256_file
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.evaluation.baselines import build_identity
from glm_quant.evaluation.compare import Positions, compare_states, targets_of
from glm_quant.evaluation.divergence_beside import divergence_figures
from glm_quant.evaluation.divergence_record import (
    DivergenceRecord,
    PassFacts,
    ReferenceRecord,
    make_rows,
)
from glm_quant.evaluation.figures import hold
from glm_quant.evaluation.token_set import TokenSet
from glm_quant.fingerprint import Canonical, fingerprint
from glm_quant.memory import half_of_memory
from glm_quant.model.geometry import Geometry
from glm_quant.recipe import DivergenceSettings
from glm_quant.streaming.activations import load_arrays, save_arrays
from glm_quant.streaming.forward import TokenBatch, forget_states, sequence_path, stream_states
from glm_quant.streaming.memory_plan import disk_bytes, plan_memory
from glm_quant.streaming.weights import BuildWeights, SourceWeights, Weights
from glm_quant.workspace import Workspace

Progress = Callable[[int, int], None]

# Raise it when the states change their meaning: references made before are then made anew.
VERSION = 1

RECORD_NAME = "record.json"
_POSITIONS = "positions.safetensors"


def divergence(
    source: Checkpoint,
    build: Path,
    tokens: TokenSet,
    folder: Path,
    *,
    references: Path | None = None,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> DivergenceRecord:
    """Compare a build with its source on some tokens; what was done before is not done again.

    Args:
        source: the bf16 checkpoint, anywhere; read once a token set, then its output head only.
        build: folder of the build.
        tokens: see `make_token_set`.
        folder: for records and states, ours alone.
        references: folder for the source's states; default: inside `folder`.
        memory_bytes: what a pass may take; default: half of the machine's memory.
        progress: called with layers done and layers to do, of both passes.

    Returns:
        The record, which stands in `folder` too.

    Raises:
        EvaluationError: the memory is too small for the longest sequence.
        DiskSpaceError: the disk is too small for the states.
        BusyError: another process is making the same reference.
    """
    work = _Work(source, tokens, memory_bytes or half_of_memory())
    tick = progress or (lambda _done, _total: None)
    depth = int(work.source.args.num_hidden_layers)
    record_folder = folder / _folder_name(fingerprint(build_inputs(build, work.key)))
    record = DivergenceRecord.load(record_folder / RECORD_NAME)
    if record is not None and record.is_whole(record_folder):
        return record
    reference, states = work.reference(
        references or folder, lambda done, _: tick(done, 2 * depth + 1)
    )
    record = work.compare(
        build, record_folder, reference, states, lambda done, _: tick(depth + done, 2 * depth + 1)
    )
    tick(2 * depth + 1, 2 * depth + 1)
    return record


@contextmanager
def reference_batch(
    source: Checkpoint, tokens: TokenSet, folder: Path, memory_bytes: int
) -> Generator[TokenBatch | None]:
    """Make the source's record in a pass that reads the source anyway.

    Args:
        source: the bf16 checkpoint, anywhere.
        tokens: as `divergence` gets them.
        folder: its `references`, or its `folder`.
        memory_bytes: what this part of the pass may take.

    Yields:
        Who is to walk along, in the block; None where the record stands already.

    Raises:
        EvaluationError: the memory is too small for the longest sequence.
        DiskSpaceError: the disk is too small for the states.
        BusyError: another process is making the same reference.
    """
    work = _Work(source, tokens, memory_bytes)
    with work.reference_folder(folder) as (place, record):
        if record is not None:
            yield None
            return
        work.require_space(place)
        started = work.begin()
        yield TokenBatch(work.sequences, work.plan, place)
        paths = [sequence_path(place, number) for number in range(len(work.sequences))]
        if all(path.exists() for path in paths):  # else the other pass had nothing to do
            work.keep_reference(place, work.facts(work.source, started))


def build_folder(folder: Path, record: DivergenceRecord) -> Path:
    """Return the folder, inside the one given to `divergence`, that a record's outputs are in."""
    return folder / _folder_name(record.fingerprint)


def _folder_name(key: str) -> str:
    return f"build-{key[:16]}"


def build_inputs(build: Path, reference: str) -> Canonical:
    """Return what decides a comparison: the build and the reference."""
    return {"version": VERSION, "build": build_identity(build), "reference": reference}


def reference_key(source: Checkpoint, tokens_sha256: str) -> str:
    """Return the fingerprint of a reference record: of what decides the source's states."""
    runtime = Path(str(SourceWeights(source).runtime.__file__))
    return fingerprint(
        {
            "version": VERSION,
            "source": {
                name: source.files[name].identity for name in ("config.json", *source.index.shards)
            },
            "tokens": tokens_sha256,
            "runtime": sha256_file(runtime),
        }
    )


class _Work:
    """A source, some tokens, and what follows from them."""

    def __init__(self, source: Checkpoint, tokens: TokenSet, memory_bytes: int) -> None:
        self.source = SourceWeights(source)
        self.tokens = tokens
        self.sequences = tokens.sequences
        self.lengths = [len(sequence) for sequence in self.sequences]
        self.key = reference_key(source, tokens.sha256)
        self.geometry = Geometry.from_config(source.config)
        self.plan = plan_memory(
            self.geometry, self.lengths, memory_bytes, self.source.runtime.BLOCK_ELEMENTS
        )

    def reference(self, parent: Path, progress: Progress) -> tuple[ReferenceRecord, Path]:
        """Return the source's record and the folder with its states; makes them if need be."""
        with self.reference_folder(parent) as (folder, record):
            if record is None:
                record = self.keep_reference(folder, self._pass(self.source, folder, progress))
        return record, folder

    @contextmanager
    def reference_folder(self, parent: Path) -> Generator[tuple[Path, ReferenceRecord | None]]:
        """Hold the folder of the source's states; gives it, and the record if it is whole."""
        folder = parent / f"reference-{self.key[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        with Workspace(folder).locked():
            record = ReferenceRecord.load(folder / RECORD_NAME)
            if record is None or not record.is_whole(folder):
                yield folder, None
                return
            for output in record.outputs:
                output.check(folder)
            yield folder, record

    def keep_reference(self, folder: Path, done: PassFacts) -> ReferenceRecord:
        """Write the record of the source's states, which all stand."""
        record = ReferenceRecord(
            fingerprint=self.key,
            outputs=[
                FileDigest.of(folder, sequence_path(folder, number).name)
                for number in range(len(self.sequences))
            ],
            source=self.source.checkpoint.source.uri,
            tokens_sha256=self.tokens.sha256,
            versions=_versions(),
            device="gpu" if mx.default_device() == mx.gpu else "cpu",
            done=done,
        )
        record.save(folder / RECORD_NAME)
        forget_states(folder)
        return record

    def compare(
        self,
        build: Path,
        folder: Path,
        reference: ReferenceRecord,
        states: Path,
        progress: Progress,
    ) -> DivergenceRecord:
        """Stream the build and compare; writes the record and every position's numbers."""
        weights = BuildWeights(build)
        folder.mkdir(parents=True, exist_ok=True)
        done = self._pass(weights, folder, progress)
        started = time.monotonic()
        positions = self._positions(weights, states, folder)
        save_arrays(
            folder / _POSITIONS,
            {
                "kl": positions.kl,
                "agrees": positions.agrees.astype(np.uint8),
                "reference_nll": positions.reference_nll,
                "build_nll": positions.build_nll,
                "lengths": np.array(self.lengths, np.int64),
            },
        )
        record = DivergenceRecord(
            fingerprint=fingerprint(build_inputs(build, self.key)),
            outputs=[FileDigest.of(folder, _POSITIONS)],
            reference=reference.fingerprint,
            source=reference.source,
            build=build_identity(build),
            index_topk=self.geometry.index_topk,
            slices=self.tokens.facts(),
            rows=make_rows(self.tokens.names, self.lengths, positions, self.geometry.index_topk),
            reference_pass=reference.done,
            build_pass=done,
            compare_seconds=round(time.monotonic() - started, 3),
            versions=_versions(),
        )
        record.save(folder / RECORD_NAME)
        forget_states(folder)
        for number in range(len(self.sequences)):
            sequence_path(folder, number).unlink()
        return record

    def _pass(self, weights: Weights, folder: Path, progress: Progress) -> PassFacts:
        self.require_space(folder)
        started = self.begin()
        stream_states(weights, self.sequences, self.plan, folder, progress)
        return self.facts(weights, started)

    def require_space(self, folder: Path) -> None:
        """Check that the disk has room for the states of a pass.

        Raises:
            DiskSpaceError: it has not.
        """
        size = disk_bytes(self.geometry, sum(self.lengths))
        require_space(folder, size, "the hidden states of a pass")

    def begin(self) -> float:
        """Return when a pass begins."""
        mx.reset_peak_memory()
        return time.monotonic()

    def facts(self, weights: Weights, started: float) -> PassFacts:
        """Return how a pass went that ends now."""
        return PassFacts(
            seconds=round(time.monotonic() - started, 3),
            weight_bytes=sum(info.size_bytes for info in weights.checkpoint.tensors.values()),
            planned_bytes=self.plan.total_bytes,
            waves=len(self.plan.waves),
            mlx_peak_bytes=mx.get_peak_memory(),
        )

    def _positions(self, build: Weights, states: Path, folder: Path) -> Positions:
        parts: list[Positions] = []
        for wave in self.plan.waves:
            p, q = (
                np.concatenate(
                    [load_arrays(sequence_path(path, number))["hidden"] for number in wave]
                )
                for path in (states, folder)
            )
            targets = targets_of([self.sequences[number] for number in wave])
            parts.append(compare_states((self.source, p), (build, q), targets))
            mx.clear_cache()
        return Positions(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("kl", "agrees", "reference_nll", "build_nll")
            )
        )


def check_bounds(record: DivergenceRecord, settings: DivergenceSettings) -> None:
    """Hold a comparison to the recipe's bounds.

    Raises:
        EvaluationError: a bound is broken; names the measure and both numbers.
    """
    hold(settings.bounds, divergence_figures(record), record.comparisons, "divergence")


def _versions() -> dict[str, str]:
    return {"glm-quant": __version__, "mlx": version("mlx"), "mlx-lm": version("mlx-lm")}
