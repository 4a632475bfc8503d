"""Prefect's server for one machine: on sqlite, its transactions wait, and its memory is bounded.

`python -m flows.server --host 127.0.0.1 --port 4200` is `prefect server start` with those options,
but for how a transaction on sqlite begins. Prefect begins most of them as readers. One that reads
and writes afterwards then fails with "database is locked" wherever another has written in between,
and at once, because a reader's snapshot grows no fresher by waiting (https://sqlite.org/isolation.html;
Prefect issue 18934). Here each takes the right to write as it begins, so that it waits instead, for
up to the minute that Prefect's connections allow. Plain reads begin no transaction and never wait.
Nor does a connection keep up to 80 MB of the database in memory, of which there may be fifteen. On
PostgreSQL nothing is changed.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from prefect.cli import app
from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.server.database.dependencies import set_database_config
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL
from sqlalchemy import make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction
from sqlalchemy.pool import ConnectionPoolEntry

CACHE_KIB = 4096  # of the database, in the memory of each connection


def main() -> None:
    """Run the server, with the arguments of this process, until a signal ends it."""
    url = PREFECT_API_DATABASE_CONNECTION_URL.value()
    if make_url(url).get_backend_name() == "sqlite":
        set_database_config(WaitingSqlite(connection_url=url))
    sys.argv[1:1] = ["server", "start"]  # `app` reads them there
    app()


class WaitingSqlite(AioSqliteConfiguration):
    """Prefect's sqlite, where whoever begins a transaction waits until no other writes."""

    def setup_sqlite(self, conn: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        """Set up a connection, with a smaller cache."""
        super().setup_sqlite(conn, record)
        cursor = conn.cursor()
        cursor.execute(f"PRAGMA cache_size = -{CACHE_KIB}")  # in KiB where it is negative
        cursor.close()

    @asynccontextmanager
    async def begin_transaction(
        self, session: AsyncSession, with_for_update: bool = False
    ) -> AsyncGenerator[AsyncSessionTransaction, None]:
        """Begin one with the right to write, whether or not `with_for_update` asks for it."""
        async with super().begin_transaction(session, with_for_update=True) as transaction:
            yield transaction


if __name__ == "__main__":
    main()
