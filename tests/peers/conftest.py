"""One peer process and one set of checkpoints for a whole run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from tests.peers import families
from tests.peers.families import Family
from tests.peers.peer import PYTHON, Peer

Checkpoints = Callable[..., Family]


@pytest.fixture(scope="session")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    if not PYTHON.exists():
        pytest.skip(f"needs mergekit 0.1.5 under {PYTHON} (MERGEKIT_PEER names another python)")
    process = Peer(tmp_path_factory.mktemp("peer"))
    yield process
    process.close()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Return the builder of a family's checkpoints; the same options give the same folder."""

    @cache
    def build(name: str, **options: Any) -> Family:
        return families.build(tmp_path_factory.mktemp(name), name, **options)

    return build
