"""The services of the system: what is written is what launchd and systemd read."""

import configparser
import plistlib
import re
import shlex
import shutil
import subprocess
import tomllib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from deployments.launchd_systemd import Place, launch_agents, rotate_log, systemd_units
from flows.watch import watch
from glm_quant.build import AssessSpec, BuildSpec
from glm_quant.recipe import recipe_names
from tasks.upstream import WatchSpec

ROOT = Path(__file__).parents[2]
PLACE = Place(Path("/opt/a b/bin/python"), Path("/srv/100% of it"))


def test_launch_agents_are_property_lists_that_stay_alive() -> None:
    """launchd gets server, worker and the nightly log keeper, each with our interpreter."""
    agents = {name: plistlib.loads(data) for name, data in launch_agents(PLACE).items()}
    assert {name.removesuffix(".plist") for name in agents} == {
        agent["Label"] for agent in agents.values()
    }
    for agent in agents.values():
        assert agent["ProgramArguments"][:4] == [str(PLACE.python), "-P", "-m", "flows.cli.main"]
        assert agent["WorkingDirectory"] == str(PLACE.home)
    assert agents["org.glm-quant.worker.plist"]["KeepAlive"]
    assert "KeepAlive" not in agents["org.glm-quant.logs.plist"]


def test_systemd_units_say_the_same() -> None:
    """Spaces and percent signs of a path survive systemd's own escaping."""
    units = systemd_units(PLACE)
    for name, data in units.items():
        unit = configparser.ConfigParser(interpolation=None, strict=False)
        unit.optionxform = str  # type: ignore[assignment]
        unit.read_string(data.decode())
        words = [word.replace("%%", "%") for word in shlex.split(unit["Service"]["ExecStart"])]
        assert words[:4] == [str(PLACE.python), "-P", "-m", "flows.cli.main"]
        assert words[4] == re.sub(r"glm-quant-(\w+)\.service", r"\1", name)
        assert unit["Service"]["Restart"] == "always"


def test_systemd_accepts_its_units(tmp_path: Path) -> None:
    """`systemd-analyze verify`, where there is one."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd is not here")
    here = Place(Path(shutil.which("python3") or "/usr/bin/python3"), tmp_path)
    for name, data in systemd_units(here).items():
        (tmp_path / name).write_bytes(data)
        command = [analyze, "--user", "verify", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert name not in done.stderr, done.stderr


def test_a_large_log_is_cut_under_its_writer(tmp_path: Path) -> None:
    """Who has the log open for appending goes on writing into the same, now short, file."""
    log = tmp_path / "worker.log"
    with log.open("ab", buffering=0) as writer:
        for text in (b"first\n", b"second\n", b"third\n"):
            writer.write(text)
            assert rotate_log(log, largest=3, keep=2)
        writer.write(b"x\n")
    assert log.read_bytes() == b"x\n"
    assert (tmp_path / "worker.log.1").read_bytes() == b"third\n"
    assert (tmp_path / "worker.log.2").read_bytes() == b"second\n"
    assert not (tmp_path / "worker.log.3").exists()
    assert not rotate_log(log, largest=3)


def test_deployments_have_parameters_that_their_flows_accept() -> None:
    """Each deployment's entrypoint exists and its spec is valid, with recipes that ship."""
    file = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text(encoding="utf-8"))
    models = {"release": BuildSpec, "assess": AssessSpec, "watch": WatchSpec}
    names: set[str] = set()
    for one in file["deployments"]:
        module, _, function = one["entrypoint"].rpartition(".")
        assert find_spec(module)
        spec = models[function].model_validate(one["parameters"]["spec"])
        assert isinstance(spec, WatchSpec) or spec.recipe in recipe_names()
        assert one["description"]
        assert "glm-quant" in one["tags"]
        assert one["work_pool"]["job_variables"] == {"stream_output": False}
        names.add(f"{function} {one['name']}")
    assert names == {"release dynamic", "release dynamic-3-5bpw", "assess assess", "watch upstream"}
    assert watch.name == "glm-quant-watch"


def test_one_version_of_prefect() -> None:
    """The dependency, what is installed from the lock, and prefect.yaml name the same version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [bounds] = [line for line in project["dependencies"] if line.startswith("prefect>=")]
    file = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text(encoding="utf-8"))
    assert bounds.startswith(f"prefect>={file['prefect-version']},<")
    assert version("prefect") == file["prefect-version"]


def test_no_flow_file_shadows_a_library() -> None:
    """A flow loaded by its path puts flows/ first on the path: its files must be nobody's name."""
    for path in (ROOT / "flows").glob("[a-z]*.py"):
        assert find_spec(path.stem) is None, path.name
