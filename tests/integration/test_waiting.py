"""Waiting for a network: told while it lasts, and not for ever."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glm_quant.data import tiny_glm_path
from glm_quant.errors import PublishError, SourceError
from glm_quant.hub.bucket import S3Target
from glm_quant.hub.repository import HubTarget
from glm_quant.hub.retry import Patience
from glm_quant.hub.upstream import pinned
from tests.hub_server import HubServer
from tests.s3_server import connect

IMPATIENT = Patience(tries=5, first_seconds=0.01, unresolved_seconds=0.0)


def plan(endpoint: str) -> subprocess.Popen[str]:
    """Start `glm-quant plan` of a repository on a Hub, as a user does."""
    program = str(Path(sys.executable).with_name("glm-quant"))
    command = [program, "plan", "--source", "hf://org/tiny", "--recipe", "demo"]
    env = {**os.environ, "HF_ENDPOINT": endpoint}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_wait_is_told_in_the_terminal() -> None:
    """After seconds it says what it waits for, how often it tried, and when it gives up.

    A Hub that comes back is used; a name that does not resolve is final within half a minute.
    """
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    begin = time.monotonic()
    away, unknown = plan(f"http://127.0.0.1:{port}"), plan("http://hub.invalid")
    assert away.stderr is not None
    line = away.stderr.readline()
    assert line.startswith("hf://org/tiny@main: nothing came for ")
    assert "tries failed, the last one: http://127.0.0.1" in line
    assert "given up after 13 failures in a row, in about 6 min" in line
    with HubServer(port=port) as hub:
        hub.add_folder("org/tiny", tiny_glm_path())
        output, _ = away.communicate(timeout=300)
    assert away.returncode == 0
    assert "org/tiny" in output
    _, errors = unknown.communicate(timeout=300)
    assert unknown.returncode == 2
    assert "nothing came for " in errors
    assert "given up after 20 s of this" in errors
    assert "hub.invalid: its name does not resolve" in errors.splitlines()[-1]
    assert time.monotonic() - begin < 150  # half a minute, and an idle core's worth of starting


def test_every_client_gives_up_a_name_that_does_not_resolve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The Hub and S3, as source, target and upstream: the host is named, the way out too."""
    hub = HubTarget("org/x", build_id="a", endpoint="http://hub.invalid", patience=IMPATIENT)
    bucket = S3Target(
        "bucket", "x", build_id="a", client=connect("http://s3.invalid"), patience=IMPATIENT
    )
    reason = r"\.invalid: its name does not resolve.*tried 1 time"
    for target in (hub, bucket):
        with pytest.raises(PublishError, match=reason) as caught:
            target.visible()
        assert caught.value.may_pass
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    with pytest.raises(SourceError, match=reason):
        pinned("org/x", patience=IMPATIENT)


def test_a_place_that_has_answered_is_borne_longer() -> None:
    """A router that starts again makes names unknown for minutes: no run of hours ends by that."""
    assert Patience().enduring().unresolved_seconds > 1e9
    assert Patience().enduring().tries == Patience().tries
