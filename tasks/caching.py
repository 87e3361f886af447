"""A task is `Cached` in the UI exactly when its stage's outputs stand on disk.

The cache key is the stage's fingerprint. Prefect alone would believe its own result record even if
the files are gone, so before it looks, a record that the disk contradicts is overwritten by one
that has expired already: the engine then finds nothing and runs the task, whose new record takes
the same key.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext
from prefect.results import get_result_store

# Any: prefect's own date type differs between its Python versions, and takes a plain datetime.
EXPIRED: Any = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass
class OnDisk(CachePolicy):
    """The key of a task is its stage's fingerprint; a hit that the disk contradicts is refused."""

    def compute_key(
        self,
        task_ctx: TaskRunContext,  # noqa: ARG002 - Prefect's signature
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],  # noqa: ARG002 - likewise
        **_: Any,
    ) -> str | None:
        """Return "stage/fingerprint"."""
        stage = inputs["stage"]
        key = f"{stage.name}/{stage.fingerprint()}"
        store = get_result_store()
        if store.exists(key) and stage.current() is None:
            store.write(obj=None, key=key, expiration=EXPIRED)
        return key


def on_disk() -> dict[str, Any]:
    """Return the task options of a stage whose outputs stand on disk; results are small JSON."""
    return {
        "cache_policy": OnDisk(),
        "persist_result": True,
        "result_serializer": "json",
        "cache_result_in_memory": False,
    }
