"""One S3 server for all tests of a process that need it."""

from collections.abc import Generator

import pytest

from tests.s3_server import seaweed


@pytest.fixture(scope="package")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[str, int]]:
    """Give the address of a SeaweedFS."""
    with seaweed(tmp_path_factory.mktemp("weed")) as address:
        yield address
