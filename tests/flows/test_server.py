import asyncio
from pathlib import Path

import pytest
from prefect.server.database.configurations import AioSqliteConfiguration
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from flows.server import CACHE_KIB, WaitingSqlite


async def read_then_write_beside_a_writer(config: AioSqliteConfiguration) -> list[str]:
    """Begin, read, let another write in between if it can, write: as a worker's heartbeat does."""
    engine = await config.engine()
    async with engine.begin() as connection:
        await connection.execute(text("create table rows (who text)"))
    has_read = asyncio.Event()

    async def reader() -> None:
        session = await config.session(engine)
        async with session, config.begin_transaction(session):
            await session.execute(text("select * from rows"))
            has_read.set()
            await asyncio.wait([other], timeout=0.5)
            await session.execute(text("insert into rows values ('reader')"))

    async def writer() -> None:
        await has_read.wait()
        session = await config.session(engine)
        async with session, config.begin_transaction(session):
            await session.execute(text("insert into rows values ('writer')"))

    other = asyncio.create_task(writer())
    try:
        await reader()
    finally:
        await other
    async with engine.connect() as connection:
        return list((await connection.execute(text("select who from rows"))).scalars())


def test_who_reads_before_writing_keeps_others_waiting_instead_of_failing(tmp_path: Path) -> None:
    config = WaitingSqlite(connection_url=f"sqlite+aiosqlite:///{tmp_path}/prefect.db")
    assert asyncio.run(read_then_write_beside_a_writer(config)) == ["reader", "writer"]


def test_a_connection_keeps_little_of_the_database_in_memory(tmp_path: Path) -> None:
    async def cache(config: AioSqliteConfiguration) -> int:
        async with (await config.engine()).connect() as connection:
            return int((await connection.execute(text("PRAGMA cache_size"))).scalar_one())

    url = f"sqlite+aiosqlite:///{tmp_path}/prefect.db"
    assert asyncio.run(cache(WaitingSqlite(connection_url=url))) == -CACHE_KIB
    assert (
        asyncio.run(cache(AioSqliteConfiguration(connection_url=url))) == 20_000
    )  # pages of 4 KiB


def test_prefect_alone_still_fails_so_that_the_server_is_needed(tmp_path: Path) -> None:
    config = AioSqliteConfiguration(connection_url=f"sqlite+aiosqlite:///{tmp_path}/prefect.db")
    with pytest.raises(OperationalError, match="database is locked"):
        asyncio.run(read_then_write_beside_a_writer(config))
