"""One S3 server for all tests of a process that need it."""

from collections.abc import Generator
from typing import Any

import pytest

from tests.s3_server import connect, seaweed


@pytest.fixture(scope="package")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[str, int]]:
    """Give the address of a SeaweedFS."""
    with seaweed(tmp_path_factory.mktemp("weed")) as address:
        yield address


@pytest.fixture(scope="package")
def client(weed: tuple[str, int]) -> Any:
    """Give a boto3 client of it."""
    return connect(f"http://{weed[0]}:{weed[1]}", seconds=20)
