"""`delta compose`: the weighted sum of deltas as one, in any order the same bytes."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergekit_ft.algebra.indices import gaps
from mergekit_ft.deltas.compose import Composed, compose
from mergekit_ft.deltas.extract import extract
from mergekit_ft.deltas.putting import apply, revert
from mergekit_ft.deltas.writing import DeltaWriter, Record
from mergekit_ft.errors import MergekitError, OperatorError, PlanError, SourceError
from mergekit_ft.sources.delta_entries import Entries
from mergekit_ft.sources.delta_file import open_delta
from mergekit_ft.sources.dtypes import CODE
from tests.checkpoints import write_checkpoint
from tests.small_models import CONFIG, cli, models

__all__ = ["models"]

BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
HASH = "ab" * 32
WORDS: dict[str, Any] = {
    "base": {"id": "org/base", "revision": None},
    "method": "by hand",
    "parameters": {},
    "density": None,
    "seed": None,
    "provenance": {},
}


def replacing(name: str, tuned: dict[str, list[tuple[int, float, float]]], n: int = 8) -> str:
    """Write a delta of (place, value, original) for each tensor."""
    records = []
    with DeltaWriter(Path(name)) as writer:
        for tensor, held in tuned.items():
            places, values, originals = (torch.tensor(part) for part in zip(*held, strict=True))
            writer.append(tensor, "indices", gaps(places))
            writer.append(tensor, "values", values.float())
            writer.append(tensor, "originals", originals.float())
            records.append(Record(tensor, "replace", "F32", (n,), HASH, len(held), "gap16"))
        writer.commit(WORDS, records)
    return name


def added(path: str | Path, name: str = "w") -> dict[int, float]:
    """Return what a delta adds, by place."""
    delta = open_delta(Path(path))
    read = Entries(delta, delta.changes[name])
    places, _ = read.within(0, delta.changes[name].numel)
    return dict(zip(places.tolist(), read.values("values", 0, len(places)).tolist(), strict=True))


def moved(base: dict[str, Tensor], seed: int, share: float = 0.01) -> dict[str, Tensor]:
    """Return a tuned model of which about a share of the entries is other than the base's."""
    dice = torch.Generator().manual_seed(seed)
    made = {}
    for name, old in base.items():
        steps = torch.randn(old.shape, generator=dice) * 0.01
        there = torch.rand(old.shape, generator=dice) < share
        made[name] = (old.float() + steps * there).to(old.dtype)
    return made


def five(dtype: torch.dtype) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Write ./b and the deltas d0 ... d4 of five tuned models."""
    dice = torch.Generator().manual_seed(0)
    shapes = {"a": (400, 500), "b": (70_000,), "c": (30,)}
    base = {n: (torch.randn(s, generator=dice) * 0.05).to(dtype) for n, s in shapes.items()}
    write_checkpoint(Path("b"), base, config=CONFIG)
    tuned = [moved(base, seed) for seed in range(1, 6)]
    for i, model in enumerate(tuned):
        write_checkpoint(Path(f"t{i}"), model, config=CONFIG)
        extract("b", f"t{i}", f"d{i}.safetensors")
    return base, tuned


def test_the_sum_worked_by_hand() -> None:
    one = replacing("one.safetensors", {"w": [(1, 3.0, 1.0), (4, 0.0, 2.0)]})  # adds 2, -2
    two = replacing("two.safetensors", {"w": [(0, 1.0, 0.0), (4, 6.0, 2.0)], "v": [(2, 1.0, 0.5)]})
    done = compose([(one, 0.5), (two, 2.0)], "sum.safetensors")
    # w: 2 * 1 at 0; 0.5 * 2 at 1; 0.5 * -2 + 2 * 4 at 4; v: 2 * 0.5
    assert added(done.out) == {0: 2.0, 1: 1.0, 4: 7.0}
    assert added(done.out, "v") == {2: 1.0}
    assert [(m["shared"], m["sign_conflicts"]) for m in done.meetings] == [(1, 1)]
    own = {m["delta"]: m["energy"] for m in done.members}  # 1 + 1 and 4 + 64 + 1
    assert own[one] == pytest.approx(2 / 71) and own[two] == pytest.approx(69 / 71)
    assert done.energy == pytest.approx((4 + 1 + 49 + 1) / 71)
    assert {m["delta"]: m["entries"] for m in done.members} == {one: 2, two: 3}


def test_what_is_replaced_by_itself_is_shared_without_conflict() -> None:
    one = replacing("one.safetensors", {"w": [(1, 1.0, 1.0), (2, 2.0, 1.0)]})
    two = replacing("two.safetensors", {"w": [(1, 2.0, 1.0), (3, 0.0, 1.0)]})
    done = compose([(one, 1.0), (two, 1.0)], "sum.safetensors")
    assert (done.meetings[0]["shared"], done.meetings[0]["sign_conflicts"]) == (1, 0)


@pytest.mark.parametrize("dtype", BITS)
def test_the_sum_of_five_put_on_the_base_is_the_arithmetic(dtype: torch.dtype) -> None:
    base, tuned = five(dtype)
    weights = [0.5, 1.0, -0.25, 2.0, 0.125]
    terms = [(f"d{i}.safetensors", w) for i, w in enumerate(weights)]
    meant = {}
    for name, old in base.items():
        pairs = zip(weights, tuned, strict=True)
        total = sum(w * (t[name].double() - old.double()) for w, t in pairs)
        meant[name] = (old.double() + total).float().to(dtype)
    compose(terms, "exact.safetensors", base="b")
    apply("b", "exact.safetensors", "out")
    made = load_file("out/model.safetensors")
    for name, old in base.items():
        changed = meant[name] != old
        assert torch.equal(made[name][changed], meant[name][changed])
        assert torch.equal(made[name][~changed].view(BITS[dtype]), old[~changed].view(BITS[dtype]))
    revert("out", "exact.safetensors", "back")
    for name, old in load_file("back/model.safetensors").items():
        assert torch.equal(old.view(BITS[dtype]), base[name].view(BITS[dtype]))
    compose(terms, "sum.safetensors")
    apply("b", "sum.safetensors", "out2")
    for name, new in load_file("out2/model.safetensors").items():
        bound = torch.finfo(dtype).eps * 2
        assert torch.allclose(new.double(), meant[name].double(), rtol=bound, atol=1e-7)


@pytest.mark.parametrize("base", [None, "b"])
def test_five_in_all_orders_are_one_file(base: str | None) -> None:
    five(torch.bfloat16)
    terms = [(f"d{i}.safetensors", 0.1 * (i + 1)) for i in range(5)]
    made = set()
    for order in itertools.permutations(terms):
        done = compose(order, "sum.safetensors", base=base, overwrite=True)
        made.add(hashlib.sha256(done.out.read_bytes()).hexdigest())
    assert len(made) == 1


def test_memory_moves_no_byte() -> None:
    five(torch.float32)
    terms = [(f"d{i}.safetensors", 1.0) for i in range(3)]
    one = compose(terms, "one.safetensors", memory=2**24).out.read_bytes()
    assert one == compose(terms, "other.safetensors").out.read_bytes()


def test_one_replacement_at_weight_1_stays_what_it_is() -> None:
    base = {"w": torch.tensor([1e30, 1.0, 0.0, 5.0])}
    tuned = {"w": torch.tensor([1e-30, 1.0, -0.0, 6.0])}
    write_checkpoint(Path("b"), base, config=CONFIG)
    write_checkpoint(Path("t"), tuned, config=CONFIG)
    extract("b", "t", "d.safetensors")
    compose([("d.safetensors", 1.0)], "same.safetensors", base="b")
    apply("b", "same.safetensors", "out")
    made = load_file("out/model.safetensors")["w"]
    assert torch.equal(made.view(torch.int32), tuned["w"].view(torch.int32))


def with_head(name: str, value: float, entries: bool = False) -> str:
    """Write a delta of a few entries of w, and of a head: whole, or one entry of it."""
    with DeltaWriter(Path(name)) as writer:
        writer.append("w", "indices", gaps(torch.tensor([1])))
        writer.append("w", "values", torch.tensor([value]))
        writer.append("w", "originals", torch.zeros(1))
        records = [Record("w", "replace", "F32", (8,), HASH, 1, "gap16")]
        if entries:
            writer.append("head", "indices", gaps(torch.tensor([2])))
            writer.append("head", "values", torch.tensor([value]))
            records.append(Record("head", "add", "F32", (4,), HASH, 1, "gap16"))
        else:
            writer.append("head", "values", torch.full((4,), value))
            shapes = {"values": (4,)}
            records.append(Record("head", "dense", "F32", (4,), HASH, 4, shapes=shapes))
        writer.commit(WORDS, records)
    return name


def test_the_head_comes_from_one_member() -> None:
    one, two = with_head("one.safetensors", 1.0), with_head("two.safetensors", 2.0)
    with pytest.raises(SourceError, match=r"several members hold .*one\.safetensors \(head\)"):
        compose([(one, 1.0), (two, 1.0)], "sum.safetensors")
    done = compose([(one, 1.0), (two, 0.5)], "sum.safetensors", head=two)
    assert (done.head, done.whole, done.left_out) == (two, ["head"], {one: ["head"]})
    assert load_file(done.out)["head:values"].tolist() == [2.0] * 4
    assert added(done.out) == {1: 2.0}
    assert "taken as they are" in done.notes[-1]


def test_entries_under_a_whole_tensor_are_left_out_only_when_that_is_asked_for() -> None:
    one = with_head("one.safetensors", 1.0)
    two = with_head("two.safetensors", 2.0, entries=True)
    with pytest.raises(SourceError, match=r"head is whole in one.*--head one\.safetensors"):
        compose([(one, 1.0), (two, 1.0)], "sum.safetensors")
    done = compose([(one, 1.0), (two, 1.0)], "sum.safetensors", head=one)
    assert done.left_out == {two: ["head"]}


def low_rank(name: str, seed: int, rank: int, scale: float) -> tuple[str, Tensor]:
    """Write a low-rank delta; return it with what it adds in float64."""
    dice = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, 6, generator=dice), torch.randn(5, rank, generator=dice)
    with DeltaWriter(Path(name)) as writer:
        writer.append("m", "a", a)
        writer.append("m", "b", b)
        shapes = {"a": (rank, 6), "b": (5, rank)}
        record = Record("m", "low_rank", "F32", (5, 6), HASH, 30, scale=scale, shapes=shapes)
        writer.commit(WORDS, [record])
    return name, scale * b.double() @ a.double()


def test_low_rank_products_are_laid_side_by_side() -> None:
    (one, first), (two, second) = (low_rank(f"{i}.safetensors", i, i + 1, 1.7) for i in (1, 2))
    done = compose([(one, 0.3), (two, -2.0)], "sum.safetensors")
    held = load_file(done.out)
    assert held["m:a"].shape == (5, 6)
    product = held["m:b"].double() @ held["m:a"].double()
    assert torch.allclose(product, 0.3 * first - 2.0 * second, rtol=0, atol=1e-5)
    with pytest.raises(SourceError, match="compose without --base"):
        write_checkpoint(Path("b"), {"m": torch.zeros(5, 6)}, config=CONFIG)
        compose([(one, 0.3)], "other.safetensors", base="b")


def test_products_and_entries_of_one_tensor_are_refused_by_name() -> None:
    one, _ = low_rank("one.safetensors", 1, 2, 1.0)
    with DeltaWriter(Path("two.safetensors")) as writer:
        writer.append("m", "indices", gaps(torch.tensor([2])))
        writer.append("m", "values", torch.ones(1))
        writer.commit(WORDS, [Record("m", "add", "F32", (5, 6), HASH, 1, "gap16")])
    with pytest.raises(SourceError, match=r"m changes by a low-rank product in one\.safetensors"):
        compose([(one, 1.0), ("two.safetensors", 1.0)], "sum.safetensors")


def test_members_of_two_bases_may_not_share_a_tensor() -> None:
    for i, name in enumerate(("b", "c")):
        base = {"w": torch.full((8,), float(i)), name: torch.zeros(4)}
        write_checkpoint(Path(name), base, config=CONFIG)
        tuned = {"w": base["w"] + torch.eye(8)[i], name: torch.eye(4)[i]}
        write_checkpoint(Path(f"t{name}"), tuned, config=CONFIG)
        extract(name, f"t{name}", f"d{name}.safetensors")
        extract(name, f"t{name}", f"own{name}.safetensors", exclude=["w"])
    with pytest.raises(SourceError, match=r"w is not the same tensor .*\((b|c)\).*\((b|c)\)"):
        compose([("db.safetensors", 1.0), ("dc.safetensors", 1.0)], "sum.safetensors")
    done = compose([("ownb.safetensors", 1.0), ("ownc.safetensors", 1.0)], "sum.safetensors")
    assert done.tensors == ["b", "c"] and "different bases (b, c)" in done.notes[0]


def test_a_base_of_other_bytes_is_refused() -> None:
    base, _ = five(torch.float32)
    write_checkpoint(Path("other"), base | {"a": base["a"] + 1}, config=CONFIG)
    with pytest.raises(SourceError, match="made for"):
        compose([("d0.safetensors", 1.0)], "sum.safetensors", base="other")
    assert not list(Path.cwd().glob("sum*"))


@pytest.mark.parametrize(
    ("terms", "asked", "error", "said"),
    [
        ([("one", 0.0)], {}, PlanError, "weight 0: give a number other than 0"),
        ([("one", float("nan"))], {}, PlanError, "weight nan"),
        ([("one", 1.0), ("copy", 0.5)], {}, PlanError, "are the same delta.*weight 1.5"),
        ([("one", 1.0)], {"head": "oen"}, PlanError, "none of the members: one"),
        ([("one", 1.0)], {"head": "one.safetensors"}, PlanError, "holds no tensor whole"),
        ([("one", 1.0), ("minus", 1.0)], {}, OperatorError, "cancel each other"),
        ([("one", 1.0)], {"memory": 2**20}, OperatorError, "raise --memory"),
        ([("one", 3e38)], {}, OperatorError, r"w: the members add up to inf at element 1"),
    ],
)
def test_what_cannot_be_is_said(
    terms: list[tuple[str, float]], asked: dict[str, Any], error: type[MergekitError], said: str
) -> None:
    replacing("one.safetensors", {"w": [(1, 3.0, 1.0)]})
    replacing("minus.safetensors", {"w": [(1, 1.0, 3.0)]})
    Path("copy.safetensors").write_bytes(Path("one.safetensors").read_bytes())
    with pytest.raises(error, match=said):
        compose([(f"{name}.safetensors", w) for name, w in terms], "sum.safetensors", **asked)
    assert not list(Path.cwd().glob("sum*"))


def test_no_member_is_an_error() -> None:
    with pytest.raises(PlanError, match="at least one"):
        compose([], "sum.safetensors")


def test_the_command_reads_weights_and_tells_how_members_meet() -> None:
    replacing("one.safetensors", {"w": [(1, 3.0, 1.0), (4, 0.0, 2.0)]})
    replacing("two.safetensors", {"w": [(4, 6.0, 2.0)]})
    words = ("delta", "compose", "one.safetensors=0.5", "two.safetensors")
    done = cli(*words, "sum.safetensors")
    assert done.exit_code == 0, done.output
    assert "share of energy" in done.stdout and "in opposite directions" in done.stdout
    told = json.loads(cli(*words, "more.safetensors", "--json").stdout)
    assert told["meetings"][0]["sign_conflicts"] == 1
    assert added("sum.safetensors") == {1: 1.0, 4: 3.0}
    assert cli("delta", "compose", "one.safetensors=x", "o.safetensors").exit_code == 2


def test_sums_agree_with_numpy_over_many_windows() -> None:
    rng = np.random.default_rng(3)
    n, members = 300_000, []
    total = np.zeros(n)
    for i in range(3):
        places = np.flatnonzero(rng.random(n) < 0.02)
        values, originals = rng.normal(size=(2, len(places))).astype(np.float32)
        held = zip(places.tolist(), values.tolist(), originals.tolist(), strict=True)
        members.append((replacing(f"{i}.safetensors", {"w": list(held)}, n), 0.5 + i))
        total[places] += (0.5 + i) * (values.astype(np.float64) - originals)
    done: Composed = compose(members, "sum.safetensors", memory=2**24)
    found = added(done.out)
    assert sorted(found) == np.flatnonzero(total).tolist()
    made = np.array([found[i] for i in sorted(found)])
    assert np.allclose(made, total[total != 0], rtol=1e-6)
    assert CODE[torch.float32] == open_delta(done.out).changes["w"].parts["values"].dtype
