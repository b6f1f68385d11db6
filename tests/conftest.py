"""What holds for every test: torch's own threads only get in each other's way here, twenty times slower."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines keep what they learn in a cache of the test run's own, and not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
