"""How far a file is written, and what a run has finished."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ft.errors import WriteError
from mergekit_ft.journal import Journal, refuse_if_held
from mergekit_ft.writer import Growth


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12).flatmap(st.permutations), st.data())
def test_a_file_grows_to_its_first_gap_in_whatever_order_it_is_written(
    lengths: list[int], data: st.DataObject
) -> None:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    growth, written = Growth(sum(lengths)), set[int]()
    for i in data.draw(st.permutations(range(len(lengths)))):
        growth.add(starts[i], starts[i] + lengths[i])
        written |= set(range(starts[i], starts[i] + lengths[i]))
        gap = next(byte for byte in range(growth.size + 1) if byte not in written)
        assert growth.end == gap
    assert growth.end == growth.size


def test_a_journal_is_read_up_to_a_line_that_was_not_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, "me")
    for name in ("a", "b"):
        journal.note_tensor(name, name == "b", [0.1, 2.0, 3.0] if name == "b" else None)
    journal.note_finding("then.0", [0.1, 3])
    journal.flush()
    journal.close()
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        again = Journal(path, "me")
        lines = whole[:cut].count(b"\n")
        assert again.changed == {n: n == "b" for n in ("a", "b")[: max(0, lines - 1)]}
        assert again.rounded == ({"b": [0.1, 2.0, 3.0]} if lines > 2 else {})
        assert again.findings == ({"then.0": [0.1, 3]} if lines == 4 else {})
        again.note_tensor("c", True)
        again.flush()
        again.close()
        last = Journal(path, "me")
        assert last.changed == {**again.changed}
        last.close()


def test_a_journal_of_another_plan_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "journal", "me").close()
    before = (tmp_path / "journal").read_bytes()
    with pytest.raises(WriteError, match="belongs to another plan"):
        Journal(tmp_path / "journal", "you")
    assert (tmp_path / "journal").read_bytes() == before


def test_a_journal_that_is_open_is_refused_to_others(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", "me")
    with pytest.raises(WriteError, match="another run is writing there"):
        Journal(tmp_path / "journal", "me")
    with pytest.raises(WriteError, match="another run is writing there"):
        refuse_if_held(tmp_path / "journal")
    journal.close()
    refuse_if_held(tmp_path / "journal")


def test_a_journal_that_holds_anything_else_is_as_good_as_none(tmp_path: Path) -> None:
    for content in ("5\n", "[]\n", '{"a": 1}\n', "\n", "\0\0\n"):
        (tmp_path / "journal").write_text(content)
        journal = Journal(tmp_path / "journal", "me")
        assert (journal.changed, journal.findings) == ({}, {})
        journal.close()
        assert (tmp_path / "journal").read_text() == '{"identity": "me"}\n'
