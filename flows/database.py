"""The database of a Prefect server: SQLite whose transactions wait for its lock.

Prefect opens SQLite in WAL mode and waits 60 s for a lock. But most of its transactions begin by
reading, and one that has read cannot wait: when another one wrote in between, SQLite refuses at
once (SQLITE_BUSY_SNAPSHOT, "database is locked"), whatever the timeout. The API answers 503 then,
and what the server does by itself (heartbeats of workers, automations) is lost. Here every
transaction takes the write lock as it begins, so that it waits its turn. Reads outside of
transactions, which are most, take no lock.

Run as a module it is Prefect's command line with that database; `glm-quant server` becomes this.
"""

import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.server.database.dependencies import set_database_config
from prefect.server.utilities.database import get_dialect
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction


class PatientSqlite(AioSqliteConfiguration):
    """SQLite whose transactions all begin with the write lock (`BEGIN IMMEDIATE`)."""

    @asynccontextmanager
    async def begin_transaction(
        self,
        session: AsyncSession,
        with_for_update: bool = False,  # noqa: ARG002 - what Prefect hands over
    ) -> AsyncGenerator[AsyncSessionTransaction, None]:
        """Begin a transaction, waiting for the lock as long as the connection's timeout says."""
        async with super().begin_transaction(session, with_for_update=True) as transaction:
            yield transaction


def wait_for_locks() -> None:
    """Let the server that is made in this process have this database, if it is SQLite."""
    url = PREFECT_API_DATABASE_CONNECTION_URL.value()
    if get_dialect(url).name == "sqlite":  # PostgreSQL locks rows
        set_database_config(PatientSqlite(connection_url=url))


def main() -> None:
    """Run Prefect's command line."""
    from prefect.cli import app

    wait_for_locks()
    sys.argv[0] = "prefect"
    app()


if __name__ == "__main__":
    main()
