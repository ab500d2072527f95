"""Tests marked network, gpu, slow or peer run only when asked for by name."""

from __future__ import annotations

import os

import pytest

ON_REQUEST = ("network", "gpu", "slow", "peer")


def pytest_addoption(parser: pytest.Parser) -> None:
    for mark in ON_REQUEST:
        parser.addoption(f"--run-{mark}", action="store_true", help=f"run tests marked {mark}")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--run-network"):
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for mark in ON_REQUEST:
        if config.getoption(f"--run-{mark}"):
            continue
        for item in items:
            if item.get_closest_marker(mark) is not None:
                item.add_marker(pytest.mark.skip(reason=f"needs --run-{mark}"))
