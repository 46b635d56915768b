"""A small arena for all tests here, its cache apart, and no key but the one a test sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import call


@pytest.fixture(scope="session", autouse=True)
def cache_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREF_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("OPENAI_API_KEY", raising=False)
        yield


@pytest.fixture(scope="session")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train.csv`` has 300 rows, ``test.csv`` 12."""
    folder = tmp_path_factory.mktemp("arena")
    outcome = call("simulate", "--rows=300", "--test_rows=12", "--seed=7", f"--output={folder}")
    assert outcome.code == 0, outcome
    return folder
