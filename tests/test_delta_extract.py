"""`delta extract`: what a tuned model changes, all of it or exactly the k largest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergekit_ft.deltas import extract as room
from mergekit_ft.deltas.extract import extract
from mergekit_ft.deltas.putting import apply, revert
from mergekit_ft.deltas.reach import Reach
from mergekit_ft.errors import MergekitError, OperatorError, PlanError, SourceError, WriteError
from mergekit_ft.sources.delta_entries import Entries
from mergekit_ft.sources.delta_file import DeltaFile, open_delta
from tests.checkpoints import write_checkpoint
from tests.small_models import CONFIG, cli, models, weights

__all__ = ["models"]

UP, EMBED, HEAD = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def nudged(base: dict[str, Tensor], share: float, seed: int = 1) -> dict[str, Tensor]:
    """Return the tensors with about this share of their entries moved."""
    dice = torch.Generator().manual_seed(seed)
    made = {}
    for name, old in base.items():
        moved = torch.rand(old.shape, generator=dice) < share
        step = 0.1 * torch.randn(old.shape, generator=dice)
        made[name] = torch.where(moved, (old.float() + step).to(old.dtype), old)
    return made


def pair(base: dict[str, Tensor], tuned: dict[str, Tensor], **config: Any) -> None:
    write_checkpoint(Path("b"), base, config={**CONFIG, **config})
    write_checkpoint(Path("t"), tuned, config={**CONFIG, **config})


def entries(delta: DeltaFile, name: str) -> tuple[list[int], Tensor, Tensor]:
    """Return the places, values and originals of a sparse change."""
    read = Entries(delta, delta.changes[name])
    places, _ = read.within(0, delta.changes[name].numel)
    parts = (read.values(part, 0, len(places)) for part in ("values", "originals"))
    return (places.tolist(), *parts)  # type: ignore[return-value]


def chosen(delta: DeltaFile) -> set[tuple[str, int]]:
    """Return every entry that a delta changes."""
    return {(name, at) for name in delta.changes for at in entries(delta, name)[0]}


def sorted_top(base: dict[str, Tensor], tuned: dict[str, Tensor], k: int) -> set[tuple[str, int]]:
    """Return the k largest changes by a stable sort in float64, of equal ones the first."""
    sizes = {n: (tuned[n].double() - old.double()).abs().flatten() for n, old in base.items()}
    order = np.argsort(-torch.cat(list(sizes.values())).numpy(), kind="stable")[:k]
    names = [(name, at) for name, size in sizes.items() for at in range(len(size))]
    return {names[i] for i in order}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Say whether two models have the same bits."""
    return one.keys() == other.keys() and all(
        torch.equal(one[n].view(BITS[t.dtype]), t.view(BITS[t.dtype])) for n, t in other.items()
    )


@pytest.mark.parametrize("dtype", BITS)
def test_all_that_differs_makes_the_tuned_model_and_comes_off_again(dtype: torch.dtype) -> None:
    base = weights(0, width=24, dtype=dtype)
    tuned = nudged(base, 0.05)
    tuned["model.norm.weight"] = base["model.norm.weight"].clone()
    tuned["model.norm.weight"][3] = -0.0
    base["model.norm.weight"][3] = 0.0
    pair(base, tuned)
    found = extract("b", "t", "d.safetensors")
    differ = {n: (tuned[n].view(BITS[dtype]) != old.view(BITS[dtype])) for n, old in base.items()}
    assert found.entries == sum(int(mask.sum()) for mask in differ.values())
    apply("b", "d.safetensors", "out")
    assert same(load_file("out/model.safetensors"), tuned)
    revert("out", "d.safetensors", "back")
    assert same(load_file("back/model.safetensors"), base)


def test_what_changed_nearly_everywhere_is_stored_whole() -> None:
    base = weights(0)
    tuned = base | {UP: base[UP] + 1.0}
    pair(base, tuned)
    found = extract("b", "t", "d.safetensors")
    assert list(found.whole) == [UP] and "smaller" in found.whole[UP]
    assert open_delta(Path("d.safetensors")).changes[UP].kind == "dense"
    apply("b", "d.safetensors", "out")
    assert same(load_file("out/model.safetensors"), tuned)


def test_a_large_share_is_stored_whole_with_what_was_kept_alone() -> None:
    base = {"w": torch.zeros(40), "x": torch.zeros(8)}
    tuned = {"w": torch.arange(1.0, 41.0), "x": torch.zeros(8)}
    pair(base, tuned)
    extract("b", "t", "d.safetensors", k=38)
    assert open_delta(Path("d.safetensors")).changes["w"].kind == "dense"
    apply("b", "d.safetensors", "out")
    kept = torch.where(tuned["w"] > 2, tuned["w"], 0.0)
    assert torch.equal(load_file("out/model.safetensors")["w"], kept)


def test_the_largest_are_kept_worked_by_hand() -> None:
    base = {"a": torch.zeros(4), "b": torch.ones(3)}
    pair(base, {"a": torch.tensor([0.5, -2.0, 0.0, 1.0]), "b": torch.tensor([2.0, 1.0, 4.0])})
    found = extract("b", "t", "d.safetensors", k=3)
    # |changes| are .5 2 0 1 and 1 0 3: the third is 1, which a[3] and b[0] have; a comes first
    delta = open_delta(Path("d.safetensors"))
    assert (delta.changes["a"].entries, delta.changes["b"].entries) == (2, 1)
    assert [part[0] for part in entries(delta, "b")[:1]] == [2]
    assert entries(delta, "a")[0] == [1, 3]
    assert entries(delta, "a")[1].tolist() == [-2.0, 1.0]
    assert entries(delta, "b")[2].tolist() == [1.0]
    assert found.energy == pytest.approx((4 + 1 + 9) / (0.25 + 4 + 1 + 1 + 9))
    assert (found.threshold, found.entries, found.considered) == (1.0, 3, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [1, 1000, 40_000])
def test_exactly_k_are_kept_as_a_sort_in_float64_has_them(dtype: torch.dtype, k: int) -> None:
    dice = torch.Generator().manual_seed(k)
    shapes = {"a": (300, 700), "b": (70_001,), "c": (1200, 1024), "d": (5,)}
    base = {  # multiples of 2^-9, so that float32 makes no difference of float64
        n: (torch.randint(-50, 50, s, generator=dice) * 2.0**-9).to(dtype)
        for n, s in shapes.items()
    }
    tuned = {  # steps of a few sizes, so that very many are equal
        n: (old.float() + torch.randint(-3, 4, old.shape, generator=dice) * 2.0**-9).to(dtype)
        for n, old in base.items()
    }
    pair(base, tuned)
    found = extract("b", "t", "d.safetensors", k=k, threads=2)
    assert found.entries == k
    assert chosen(open_delta(found.out)) == sorted_top(base, tuned, k)


def test_within_each_tensor_each_has_its_share() -> None:
    dice = torch.Generator().manual_seed(5)
    base = {"a": torch.zeros(1200, 1024), "b": torch.zeros(1000)}
    tuned = {n: torch.randn(old.shape, generator=dice) for n, old in base.items()}
    tuned["a"] *= 100
    pair(base, tuned)
    found = extract("b", "t", "d.safetensors", density=0.01, scope="tensor")
    delta = open_delta(found.out)
    for name, old in base.items():
        k = old.numel() // 100
        assert {(name, at) for at in entries(delta, name)[0]} == sorted_top(
            {name: old}, {name: tuned[name]}, k
        )


def test_differences_of_float64_are_taken_in_float64() -> None:
    base = {"w": torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)}
    pair(base, {"w": torch.tensor([2.0, 2.0 + 1e-12, 1.0], dtype=torch.float64)})
    extract("b", "t", "d.safetensors", k=1)
    assert entries(open_delta(Path("d.safetensors")), "w")[0] == [1]


@pytest.mark.parametrize("asked", [{}, {"k": 30_000}, {"density": 0.02, "scope": "tensor"}])
def test_neither_memory_nor_threads_move_a_byte(asked: dict[str, Any]) -> None:
    dice = torch.Generator().manual_seed(2)
    base = {n: torch.randn(s, generator=dice).bfloat16() for n, s in (("a", 1_500_000), ("b", 9))}
    pair(base, nudged(base, 0.2))
    made = set()
    for memory, threads in ((2**24, 1), (2**30, 1), (2**25, 2), (2**30, 3)):
        out = Path(f"{memory}-{threads}.safetensors")
        extract("b", "t", out, memory=memory, threads=threads, **asked)
        made.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert len(made) == 1


def test_a_guess_that_was_too_high_costs_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"a": torch.zeros(1_100_000), "b": torch.zeros(10)}
    tuned = nudged(base, 0.1)
    pair(base, tuned)
    for scope in ("model", "tensor"):
        extract("b", "t", f"{scope}.safetensors", density=0.01, scope=scope)
        with monkeypatch.context() as patch:
            patch.setattr(room, "guessed", lambda sample, total, rank: Reach(rank, [1e9]))
            extract("b", "t", f"{scope}-high.safetensors", density=0.01, scope=scope)
        one, other = Path(f"{scope}.safetensors"), Path(f"{scope}-high.safetensors")
        assert one.read_bytes() == other.read_bytes()


def test_each_touched_tensor_of_the_base_is_hashed(models: Path) -> None:
    extract("base", "maths", "d.safetensors", k=5)
    base = load_file("base/model.safetensors")
    for name, change in open_delta(models / "d.safetensors").changes.items():
        assert change.sha256 == hashlib.sha256(base[name].numpy().tobytes()).hexdigest()


def test_the_file_says_how_it_was_made(models: Path) -> None:
    extract("base", "maths", "d.safetensors", density=0.05, exclude=["*norm*"])
    words = open_delta(models / "d.safetensors").words
    assert words["base"] == {"id": "base", "revision": None}
    assert words["parameters"]["exclude"] == ["*norm*"]
    assert words["provenance"]["tuned"] == {"id": "maths", "revision": None}
    assert 0.05 < words["provenance"]["energy_kept"] < 1


def test_new_tensors_and_other_shapes_and_asked_for_ones_are_stored_whole() -> None:
    base = weights(0)
    tuned = base | {UP: base[UP] * 1.5, EMBED: torch.ones(20, 8), "score.weight": torch.ones(2, 8)}
    tuned[HEAD] = torch.ones(20, 8)
    pair(base, tuned)
    found = extract("b", "t", "d.safetensors", k=3, dense=["*mlp.up*"])
    assert set(found.whole) == {EMBED, HEAD, UP, "score.weight"}
    assert "shape [20, 8], [16, 8] in the base" in found.whole[EMBED]
    assert "new" in found.whole["score.weight"] and "--dense" in found.whole[UP]
    delta = open_delta(found.out)
    assert delta.changes["score.weight"].sha256 is None
    assert delta.changes[EMBED].exact
    assert not [n for n in delta.changes if "layers.1" in n]  # it is the base's own
    apply("b", found.out, "out")
    assert same(load_file("out/model.safetensors"), tuned)


def test_empty_and_scalar_and_8_bit_tensors_go_along() -> None:
    base = {"w": torch.ones(3), "f": torch.ones(4).to(torch.float8_e4m3fn)}
    tuned = {
        "w": torch.tensor([1.0, 2.0, 1.0]),
        "f": torch.tensor([1.0, 1.0, 3.0, 1.0]).to(torch.float8_e4m3fn),
        "none": torch.empty(0, 4),
        "one": torch.tensor(3.0),
    }
    pair(base, tuned)
    found = extract("b", "t", "d.safetensors", k=2)
    assert set(found.whole) == {"none", "one"} and found.entries == 2
    apply("b", found.out, "out")
    made = load_file("out/model.safetensors")
    assert all(torch.equal(made[n].float(), t.float()) for n, t in tuned.items())


def test_tied_weights_count_once() -> None:
    base = weights(0)
    del base[HEAD]
    tuned = nudged(base, 0.2)
    pair(base, tuned, tie_word_embeddings=True)
    once = extract("b", "t", "once.safetensors")
    twice = tuned | {HEAD: tuned[EMBED]}
    write_checkpoint(Path("t2"), twice, config=CONFIG | {"tie_word_embeddings": True})
    assert extract("b", "t2", "two.safetensors").entries == once.entries
    write_checkpoint(
        Path("b2"), base | {HEAD: base[EMBED]}, config=CONFIG | {"tie_word_embeddings": True}
    )
    found = extract("b2", "t", "both.safetensors")  # on disk twice: both change, counted once
    assert found.entries == once.entries and HEAD in found.tensors
    apply("b2", found.out, "out")
    assert same(load_file("out/model.safetensors"), twice)


def test_a_head_that_would_be_lost_is_refused() -> None:
    base = weights(0)
    head = base.pop(HEAD)
    write_checkpoint(Path("b"), base, config=CONFIG | {"tie_word_embeddings": True})
    write_checkpoint(Path("t"), base | {HEAD: head}, config=CONFIG)
    with pytest.raises(SourceError, match=r"of its own, which b ties to .*--exclude"):
        extract("b", "t", "d.safetensors")


def test_another_dtype_is_rounded_and_said_or_stored_as_it_is() -> None:
    base = {"a": torch.ones(4).bfloat16(), "b": torch.ones(4).bfloat16()}
    tuned = {"a": torch.tensor([1.0, 1.001, 2.003, 1.0]), "b": torch.ones(4)}
    pair(base, tuned)
    found = extract("b", "t", "d.safetensors")
    assert "rounded" in found.notes[0] and found.entries == 1  # 1.001 is 1 in bfloat16
    apply("b", found.out, "out")
    assert same(load_file("out/model.safetensors"), {n: t.bfloat16() for n, t in tuned.items()})
    extract("b", "t", "whole.safetensors", dense=["a"])
    assert open_delta(Path("whole.safetensors")).changes["a"].dtype == "F32"


@pytest.mark.parametrize("asked", [{}, {"k": 2}, {"dense": ["w"]}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_with_their_place(asked: dict[str, Any], bad: float) -> None:
    base = {"w": torch.zeros(70_000)}
    tuned = {"w": torch.zeros(70_000)}
    tuned["w"][66_000], tuned["w"][1] = bad, 1.0
    pair(base, tuned)
    with pytest.raises(OperatorError, match=r"t: w holds (nan|inf) at element 66000;"):
        extract("b", "t", "d.safetensors", **asked)
    assert sorted(p.name for p in Path.cwd().glob("d.*")) == []
    extract("b", "t", "d.safetensors", allow_non_finite=True, **asked)
    apply("b", "d.safetensors", "out", allow_non_finite=True)
    assert same(load_file("out/model.safetensors"), tuned)


def test_nan_of_the_base_is_refused() -> None:
    pair({"w": torch.tensor([float("nan"), 1.0])}, {"w": torch.tensor([1.0, 2.0])})
    with pytest.raises(OperatorError, match="b: w holds nan at element 0"):
        extract("b", "t", "d.safetensors", k=1)


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"include": ["*.mpl.*"]}, PlanError, r"--include '\*.mpl.\*' matches no tensor"),
        ({"exclude": ["*norm*"], "dense": ["*norm*"]}, PlanError, "both match"),
        ({"k": 3, "density": 0.1}, PlanError, "give one of them"),
        ({"k": 0}, PlanError, "at least one"),
        ({"density": 1.5}, PlanError, "at most 1"),
        ({"k": 3, "scope": "tensor"}, PlanError, "needs --density"),
        ({"memory": 2**20}, OperatorError, "raise --memory"),
    ],
)
def test_what_cannot_be_is_said(
    models: Path, asked: dict[str, Any], error: type[MergekitError], said: str
) -> None:
    with pytest.raises(error, match=said):
        extract("base", "maths", "d.safetensors", **asked)
    assert not list(models.glob("d.*"))


def test_a_model_that_lacks_tensors_is_refused_unless_they_are_left_out() -> None:
    base = weights(0)
    tuned = nudged(base, 0.2)
    del tuned[UP], tuned[HEAD]
    pair(base, tuned)
    with pytest.raises(SourceError, match=r"t lacks 2 of the tensors of b .*--exclude"):
        extract("b", "t", "d.safetensors")
    found = extract("b", "t", "d.safetensors", exclude=[UP, HEAD])
    assert sorted(found.excluded) == sorted([UP, HEAD])


def test_nothing_changed_is_an_error(models: Path) -> None:
    with pytest.raises(OperatorError, match="nothing changed"):
        extract("base", "base", "d.safetensors")
    assert not list(models.glob("d.*"))


def test_fewer_changes_than_asked_for_are_said() -> None:
    pair({"w": torch.zeros(9)}, {"w": torch.tensor([1.0, *[0.0] * 8])})
    found = extract("b", "t", "d.safetensors", k=4)
    assert found.entries == 1 and "only 1 entries differ, of 4" in found.notes[0]


def test_an_existing_file_is_kept_unless_it_may_go(models: Path) -> None:
    Path("d.safetensors").write_text("mine")
    with pytest.raises(WriteError, match="exists"):
        extract("base", "maths", "d.safetensors")
    assert Path("d.safetensors").read_text() == "mine"
    extract("base", "maths", "d.safetensors", overwrite=True)
    assert open_delta(models / "d.safetensors").changes


def test_the_command_tells_what_it_made(models: Path) -> None:
    done = cli("delta", "extract", "base", "maths", "d.safetensors", "--k", "7", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["entries"], told["out"]) == (7, "d.safetensors")
    done = cli("delta", "extract", "base", "maths", "e.safetensors", "--density", "0.1")
    assert "energy kept" in done.stdout and "e.safetensors: " in done.stdout
