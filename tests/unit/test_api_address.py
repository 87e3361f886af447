"""Which Prefect server a command talks to, where the one that was named does not answer."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.context import refresh_global_settings_context
from prefect.settings import PREFECT_API_URL

from flows.api_address import VARIABLE, connect, connect_if_there, save_address
from glm_quant.errors import ServiceError


@pytest.fixture
def silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address at which nothing listens, and a fresh profile."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "profiles.toml"))
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    refresh_global_settings_context()
    yield f"http://127.0.0.1:{port}/api"
    monkeypatch.undo()
    refresh_global_settings_context()


def test_an_address_of_the_profile_that_is_silent_stops_no_run(silent: str) -> None:
    """The server was saved and is down today: a person is told, Prefect starts a temporary one."""
    save_address(silent)
    refresh_global_settings_context()
    assert silent == PREFECT_API_URL.value()
    notice = connect_if_there()
    assert notice
    assert silent in notice
    assert os.environ[VARIABLE] == ""
    assert not PREFECT_API_URL.value()


def test_an_address_of_the_environment_that_is_silent_is_an_error(
    silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was given for this command, so nothing else is used in its place."""
    monkeypatch.setenv(VARIABLE, silent)
    refresh_global_settings_context()
    for use in (connect, connect_if_there):
        with pytest.raises(ServiceError, match=silent):
            use()
