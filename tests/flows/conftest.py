import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """The address of a Prefect server that all tests of flows share."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield PREFECT_API_URL.value()


@pytest.fixture(scope="session", autouse=True)
def _heeded_interrupt() -> None:
    """A shell starts background jobs deaf to Ctrl-C, and the programs under test inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
