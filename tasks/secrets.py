"""Credentials from Prefect Secret blocks, for a worker whose environment has none.

A block is read inside the process of the run and goes into that process's environment, where the
Hub's and S3's clients look anyway. Nothing else sees it: no parameter, job variable, record or log.
"""

import logging
import os
from typing import cast

from prefect.blocks.system import Secret

# Secret block, to the variable that the client libraries read.
SECRETS = {
    "hf-token": "HF_TOKEN",
    "aws-access-key-id": "AWS_ACCESS_KEY_ID",
    "aws-secret-access-key": "AWS_SECRET_ACCESS_KEY",
    "aws-session-token": "AWS_SESSION_TOKEN",
}

_log = logging.getLogger("glm_quant.secrets")


def load_secrets() -> None:
    """Set what the environment lacks and a block has; what the environment has wins."""
    for block, variable in SECRETS.items():
        if variable in os.environ:
            continue
        try:
            secret = cast("Secret[str]", Secret.load(block))
        except ValueError:  # Prefect's way to say that there is no such block
            continue
        os.environ[variable] = secret.get()
        _log.info("%s comes from the Secret block %s", variable, block)
