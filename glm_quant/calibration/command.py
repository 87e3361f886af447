"""`glm-quant convert` where the recipe wants a calibration of its own: that comes first."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from glm_quant.calibration.build_calibration import (
    calibrate_build,
    converts_while_calibrating,
    imatrix_folder,
    record_path,
    standing_imatrix,
)
from glm_quant.calibration.one_pass import source_bytes
from glm_quant.checkpoint.source import Source
from glm_quant.quantize.command import OpenConversion, open_conversion, owner_of
from glm_quant.quantize.convert import Watcher


def open_calibrated(
    source: str | Path | Source,
    recipe: str,
    output: Path,
    watching: Callable[[], AbstractContextManager[Watcher]],
    workers: int | None = None,
    reuse: Sequence[str] = (),
) -> OpenConversion:
    """Open a conversion as `open_conversion` does, after what its recipe wants to know is known.

    Args:
        source: a folder, or what `glm_quant.hub.open_source` returned.
        recipe: path of a .yaml file, or a name in recipes/.
        output: folder to make; the calibration stands beside it, in `.NAME.glm-quant/`.
        watching: entered to see how the calibration goes, if there is one.
        workers: threads; default: one a core.
        reuse: workspaces or outputs of other conversions, whose tensors may be copied.

    Raises:
        InputError: one of them is not what it should be.
        BusyError: another process is converting into the output.
    """
    opened = open_conversion(source, recipe, output, workers, reuse)
    wanting, workspace = opened.recipe, opened.workspace
    if not opened.conversion.plan.uncalibrated:
        return opened
    if standing_imatrix(opened.checkpoint, wanting, workspace) is None:
        workspace.create()
        with workspace.locked(), watching() as watcher:
            together = converts_while_calibrating(opened.checkpoint, wanting)
            beside = source_bytes(opened.checkpoint, workspace) if together else 0
            opened.conversion.check_space(source_bytes=beside)
            owner_of(wanting, opened.checkpoint.source.uri).save(workspace)
            watcher.begin("calibrate")
            record = calibrate_build(
                opened.checkpoint,
                wanting,
                workspace,
                lambda done, total: watcher.move("calibrate", done, total),
                converting=opened.conversion if together else None,
            )
            record.save(record_path(workspace))
    return open_conversion(source, recipe, output, workers, reuse, imatrix_folder(workspace))
