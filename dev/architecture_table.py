"""Write `docs/architectures.md`: what is planned and converted of each model of mlx-lm.

    uv run python -m dev.architecture_table docs/architectures.md

For each model file a small random checkpoint is made, in the layout that transformers saves where
it has the architecture, else under mlx-lm's own names; it is planned, converted with
`uniform-4bit`, and held tensor by tensor against what mlx-lm makes of it.
"""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.architectures.native_models import make_native_checkpoint, model_names
from tests.architectures.small_models import make_small_checkpoint
from tests.architectures.test_matrix import VENDOR, check

_TEXT = """\
# Architectures

What is planned and converted of each of the {total} models of mlx-lm {mlx_lm}: **{equal}** give the
bytes of `mlx_lm.convert`. Written by `dev/architecture_table.py`, with transformers {transformers}:
a small random checkpoint of each is made, in the layout that transformers saves ("vendor") or under
mlx-lm's own names ("mlx-lm"), converted with `uniform-4bit`, verified against its source, loaded by
stock mlx-lm, and held tensor by tensor against what mlx-lm makes of it. Real checkpoints were not
at hand. `glm_moe_dsa` is this package's flagship and has a runtime of its own.

| model | layout | planned, converted, verified |
|---|---|---|
{rows}
"""
_FLAGSHIP = "glm_moe_dsa"


def main() -> None:
    """Write the table to the file that is named."""
    vendor = set(VENDOR.split())
    rows: list[str] = []
    equal = 0
    names = model_names()
    for name in names:
        if name == _FLAGSHIP:
            rows.append(f"| `{name}` | vendor | its own tests: `tests/integration` |")
            continue
        layout, outcome = ("vendor" if name in vendor else "mlx-lm"), "equal"
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "source"
            make = make_small_checkpoint if name in vendor else make_native_checkpoint
            try:
                make(name, source)
                check(source, Path(folder) / "work")
            except (Exception, SystemExit) as error:
                lines = str(error).splitlines() or [type(error).__name__]
                outcome = lines[0].replace(str(source.parent), "…").replace("|", "\\|")[:160]
        equal += outcome == "equal"
        rows.append(f"| `{name}` | {layout} | {outcome} |")
    text = _TEXT.format(
        total=len(names),
        equal=equal,
        mlx_lm=version("mlx-lm"),
        transformers=version("transformers"),
        rows="\n".join(rows),
    )
    Path(sys.argv[1]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
