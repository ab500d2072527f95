"""The page of silent failures names tests that exist, for every failure that merging knows."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "silent-failures.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
ELSEWHERE = {20}  # about searching

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs a checkout")


def sections() -> dict[int, str]:
    """Return the text under each number."""
    parts = re.split(r"(?m)^## ([0-9]+)\. ", PAGE.read_text(encoding="utf-8"))
    return {int(number): text for number, text in zip(parts[1::2], parts[2::2], strict=True)}


@cache
def named_in(file: Path) -> set[str]:
    """Return the names of the tests in a file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_page_names_exists() -> None:
    named = NAMED.findall(PAGE.read_text(encoding="utf-8"))
    assert len(named) > 60
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / file).is_file() or name not in named_in(ROOT / file)
    ]
    assert missing == []


def test_every_failure_of_merging_has_a_test() -> None:
    found = sections()
    assert list(found) == list(range(1, 26))
    without = {number for number, text in found.items() if not NAMED.search(text)}
    assert without == ELSEWHERE


def test_every_test_of_silent_failures_is_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for file in sorted((ROOT / "tests").glob("test_silent_failures*.py")):
        tests = {name for name in named_in(file) if name.startswith("test_")}
        if file.name == Path(__file__).name:
            continue
        unnamed = {name for name in tests if f"{file.name}::{name}`" not in page}
        assert unnamed == set(), file.name
