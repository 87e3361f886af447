"""A build goes out under its source's licence, and under none that nobody acknowledged."""

import hashlib
from pathlib import Path

import pytest

from glm_quant.checkpoint.source import FolderSource
from glm_quant.errors import PublishError
from glm_quant.hub.license import require_license
from glm_quant.recipe import PublishSettings

MIT = (Path(__file__).parents[2] / "LICENSE").read_text()
OWN = "GLM-5.3 licence: you may not, unless we say so.\n"
OWN_SHA = hashlib.sha256(OWN.encode()).hexdigest()
OTHER = "---\nlicense: other\nlicense_name: glm-5.3\n---\n# GLM\n"


def require(folder: Path, files: dict[str, str], acknowledged: str | None, name: str) -> None:
    for file, text in files.items():
        (folder / file).write_text(text)
    settings = PublishSettings(license=name, acknowledge_license=acknowledged)
    require_license(FolderSource(folder), settings, "my.yaml")


@pytest.mark.parametrize(
    ("files", "acknowledged", "name"),
    [
        ({"README.md": "---\nlicense: mit\n---\n"}, None, "mit"),
        ({"README.md": "no front matter", "LICENSE": MIT}, None, "mit"),
        ({"README.md": OTHER}, "glm-5.3", "glm-5.3"),
        ({"README.md": OTHER, "LICENSE": OWN}, OWN_SHA, "glm-5.3"),
        ({"LICENSE": OWN}, OWN_SHA, "glm-5.3"),
        ({}, "mit", "mit"),
    ],
)
def test_what_may_go_out(
    tmp_path: Path, files: dict[str, str], acknowledged: str | None, name: str
) -> None:
    """An open licence by its name; any other when somebody said that they read it."""
    require(tmp_path, files, acknowledged, name)


@pytest.mark.parametrize(
    ("files", "acknowledged", "name", "said"),
    [
        ({"README.md": OTHER}, None, "mit", r"license is 'mit', but .* is under 'glm-5\.3'"),
        ({"README.md": OTHER}, None, "glm-5.3", "Read it, then write `acknowledge_license: glm"),
        ({"LICENSE": OWN}, "glm-5.3", "glm-5.3", f"acknowledge_license: {OWN_SHA}"),
        ({"LICENSE": f"{MIT}{OWN * 40}"}, None, "mit", "a licence of its own"),
        ({"README.md": "---\nlicense: [mit\n---\n"}, None, "mit", "states no licence"),
        ({"LICENSE": MIT}, None, "apache-2.0", "license is 'apache-2.0', but .* is under 'mit'"),
    ],
)
def test_what_may_not_go_out(
    tmp_path: Path, files: dict[str, str], acknowledged: str | None, name: str, said: str
) -> None:
    """With what the recipe should say."""
    with pytest.raises(PublishError, match=said):
        require(tmp_path, files, acknowledged, name)
