"""SHA-256 of files: while they grow, and remembered only where that is safe."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mergekit_ft.checkpoint.digests import CHUNK, Digests, Following, default_memory
from mergekit_ft.writer import Growth

LONG_AGO = 1_600_000_000


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "sha256.json"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file that nobody has touched for a while: the clock is an hour ahead."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2 * CHUNK + 5))
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3600 * 10**9)
    return path


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest(path: Path, memory: Path) -> str:
    with Digests(2, memory) as hasher:
        return hasher.of(path)


def test_a_file_is_hashed_whole(file: Path, memory: Path) -> None:
    assert digest(file, memory) == sha(file.read_bytes())


def test_an_empty_file_is_hashed_too(tmp_path: Path, memory: Path) -> None:
    (tmp_path / "empty").touch()
    assert digest(tmp_path / "empty", memory) == sha(b"")


def test_a_growing_file_is_hashed_behind_its_first_gap(tmp_path: Path, memory: Path) -> None:
    data, path = os.urandom(3 * CHUNK), tmp_path / "growing"
    path.write_bytes(bytes(len(data)))
    growth = Growth(len(data))
    with Digests(1, memory) as hasher, open(path, "r+b", buffering=0) as into:
        following = hasher.follow(path, growth)
        for start in (CHUNK, 0, 2 * CHUNK):  # the second chunk before the first
            into.seek(start)
            into.write(data[start : start + CHUNK])
            growth.add(start, start + CHUNK)
            following.advance(start, memoryview(data)[start : start + CHUNK])
        assert hasher.of(path) == sha(data)


def test_what_was_just_written_is_not_read_again(tmp_path: Path) -> None:
    data, path, growth = os.urandom(300), tmp_path / "growing", Growth(300)
    path.write_bytes(data[:100] + bytes(100) + data[200:])  # the second part is not on disk
    following = Following(path, growth)
    for start in (200, 0, 100):
        growth.add(start, start + 100)
        following.advance(start, memoryview(data)[start : start + 100])
    assert following.result() == sha(data)


@pytest.mark.parametrize("threads", [1, 4])
def test_many_who_write_hash_a_file_once_and_in_order(tmp_path: Path, threads: int) -> None:
    pieces, length = 400, 1000
    data, path, growth = os.urandom(pieces * length), tmp_path / "growing", Growth(pieces * length)
    path.write_bytes(bytes(len(data)))
    following, into = Following(path, growth), os.open(path, os.O_RDWR)

    def write(number: int) -> None:
        for i in range(number, pieces, threads):
            start = i * length
            os.pwrite(into, data[start : start + length], start)
            growth.add(start, start + length)
            following.advance(start, memoryview(data)[start : start + length])

    with ThreadPoolExecutor(threads) as writers:
        list(writers.map(write, range(threads)))
    os.close(into)
    assert following.result() == sha(data)


def test_a_file_that_is_not_whole_has_no_digest(tmp_path: Path, memory: Path) -> None:
    path, growth = tmp_path / "growing", Growth(10)
    path.write_bytes(bytes(10))
    growth.add(0, 5)
    with Digests(1, memory) as hasher:
        hasher.follow(path, growth)
        with pytest.raises(OSError, match="byte 5 of 10"):
            hasher.of(path)


def test_closing_ends_every_thread(file: Path, memory: Path) -> None:
    before = threading.active_count()
    hasher = Digests(3, memory)
    for _ in range(3):
        hasher.start(file)
    hasher.close()
    assert threading.active_count() == before


def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the list that every file's path is added to when it is read."""
    seen: list[Path] = []
    original = Digests._digest

    def noted(self: Digests, path: Path) -> str:
        seen.append(path)
        return original(self, path)

    monkeypatch.setattr(Digests, "_digest", noted)
    return seen


def test_a_file_that_nobody_touched_is_read_once(
    file: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = reads(monkeypatch)
    assert digest(file, memory) == digest(file, memory) == sha(file.read_bytes())
    assert seen == [file]


def test_a_file_of_a_moment_ago_is_not_remembered(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, path = reads(monkeypatch), tmp_path / "fresh"
    path.write_bytes(b"now")
    assert digest(path, memory) == digest(path, memory)
    assert len(seen) == 2 and not memory.exists()


def test_other_bytes_of_the_same_size_and_time_are_seen(file: Path, memory: Path) -> None:
    os.utime(file, (LONG_AGO, LONG_AGO))
    first = digest(file, memory)
    changed = bytes(reversed(file.read_bytes()))
    file.write_bytes(changed)
    os.utime(file, (LONG_AGO, LONG_AGO))  # the change of status cannot be set back
    assert digest(file, memory) == sha(changed) != first


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(
    file: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Digests._digest

    def changing(self: Digests, path: Path) -> str:
        found = original(self, path)
        path.write_bytes(b"other")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Digests, "_digest", changing)
        digest(file, memory)
    assert digest(file, memory) == sha(b"other")


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"x": 1}'])
def test_a_memory_that_is_spoilt_costs_time_and_nothing_else(
    content: str, file: Path, memory: Path
) -> None:
    memory.parent.mkdir()
    memory.write_text(content)
    assert digest(file, memory) == sha(file.read_bytes())
    assert str(file.resolve()) in json.loads(memory.read_text())


def test_a_memory_that_cannot_be_written_costs_time_and_nothing_else(
    file: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert digest(file, tmp_path / "cache" / "sha256.json") == sha(file.read_bytes())


def test_what_is_gone_is_forgotten(file: Path, tmp_path: Path, memory: Path) -> None:
    digest(file, memory)
    other = tmp_path / "other"
    file.rename(other)
    digest(other, memory)
    assert list(json.loads(memory.read_text())) == [str(other.resolve())]


def test_the_memory_lies_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("MERGEKIT_FT_CACHE", raising=False)
    assert default_memory() == tmp_path / "xdg" / "mergekit-ft" / "sha256.json"
    monkeypatch.setenv("MERGEKIT_FT_CACHE", str(tmp_path / "ours"))
    assert default_memory() == tmp_path / "ours" / "sha256.json"
