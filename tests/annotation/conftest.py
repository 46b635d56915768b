"""A small arena for all tests here, its cache apart, and no key but the one a test sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import nothing_of_the_users, simulate


@pytest.fixture(scope="session", autouse=True)
def cache_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with nothing_of_the_users(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="session")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train.csv`` has 300 rows, ``test.csv`` 12."""
    return simulate(tmp_path_factory.mktemp("arena"), rows=300, test_rows=12)
