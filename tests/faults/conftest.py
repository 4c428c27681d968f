"""One fork server and one uninterrupted run for all tests of faults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from faults.runs import Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Starts runs in forks."""
    started = Runs(tmp_path_factory.mktemp("faults"))
    yield started
    started.close()
