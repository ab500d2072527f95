"""Deltas of other tools come in and go out with the values that their own arithmetic gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergekit_ft.deltas import composable
from mergekit_ft.deltas.convert import convert
from mergekit_ft.deltas.extract import extract
from mergekit_ft.deltas.putting import apply, revert
from mergekit_ft.errors import PlanError, SourceError
from mergekit_ft.sources.delta_file import open_delta
from tests.checkpoints import tiny_llama, write_checkpoint
from tests.small_models import CONFIG, cli, models, weights

__all__ = ["models"]

UP = "model.layers.1.mlp.up_proj.weight"  # (16, 8)
STACK = "model.layers.0.mlp.experts"  # (3, 4, 5)


SAFE: list[Any] = [np.int64(0).__reduce__()[0], np.dtype, np.dtypes.Int64DType]  # of numpy


def coordinates(flat: int, size: tuple[int, ...]) -> tuple[int, ...]:
    """Return where a column-major place is: coord_d = (idx // prod(size[:d])) % size[d]."""
    found, below = [], 1
    for extent in size:
        found.append((flat // below) % extent)
        below *= extent
    return tuple(found)


def theirs(path: Path, diffs: dict[str, tuple[tuple[int, ...], dict[int, float]]]) -> Path:
    """Write composable-sft's file: column-major places to values."""
    made: dict[str, Any] = {}
    for name, (size, entries) in diffs.items():
        flat = sorted(entries)
        steps = np.diff(np.array(flat), prepend=0)
        made[name] = {
            "size": torch.Size(size),
            "index_steps": [np.int64(steps[0]), *map(int, steps[1:])],
            "values": torch.tensor([entries[i] for i in flat]),
        }
    path.mkdir()
    torch.save(
        {"diffs": made, "abs": {"lm_head.weight": torch.full((16, 8), 3.0)}}, path / composable.FILE
    )
    return path


def decoded(path: Path) -> dict[str, Tensor]:
    """Return what a file adds, by the arithmetic of the format, plainly."""
    with torch.serialization.safe_globals(SAFE):
        held = torch.load(path / composable.FILE, weights_only=True)
    found = {}
    for name, part in held["diffs"].items():
        size = tuple(part["size"])
        dense, flat = torch.zeros(size), 0
        for step, value in zip(part["index_steps"], part["values"], strict=True):
            flat += int(step)
            dense[coordinates(flat, size)] = value
        found[name] = dense
    return found


def with_stack() -> None:
    base = weights(0) | {STACK: torch.arange(60.0).reshape(3, 4, 5)}
    write_checkpoint(Path("base"), base, config=CONFIG)


DIFFS = {
    UP: ((16, 8), {0: 0.5, 1: -1.0, 17: 2.0, 127: 4.0}),
    STACK: ((3, 4, 5), {1: 1.0, 7: 2.0, 59: 3.0}),
}


def test_their_diffs_come_in_at_the_places_of_their_arithmetic_three_axes_too() -> None:
    with_stack()
    made = convert(
        theirs(Path("sft"), DIFFS), "d.safetensors", of="composable-sft", to="delta", base="base"
    )
    assert (made.tensors, made.entries) == (3, 4 + 3 + 128)
    apply("base", "d.safetensors", "on")
    base, on = load_file("base/model.safetensors"), load_file("on/model.safetensors")
    for name, (size, entries) in DIFFS.items():
        wanted = base[name].clone()
        for flat, value in entries.items():
            wanted[coordinates(flat, size)] += value
        assert torch.equal(on[name], wanted)
    assert bool((on["lm_head.weight"] == 3.0).all())


def test_a_round_trip_gives_their_values_again() -> None:
    with_stack()
    theirs(Path("sft"), DIFFS)
    convert("sft", "d.safetensors", of="composable-sft", to="delta", base="base")
    convert("d.safetensors", "again", of="delta", to="composable-sft")
    one, other = decoded(Path("sft")), decoded(Path("again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with torch.serialization.safe_globals(SAFE):
        held = torch.load(Path("again") / composable.FILE, weights_only=True)
    steps = held["diffs"][UP]["index_steps"]
    assert isinstance(steps[0], np.int64) and all(type(step) is int for step in steps[1:])


def test_exact_conversions_come_off_to_the_bit() -> None:
    with_stack()
    theirs(Path("sft"), DIFFS)
    convert("sft", "d.safetensors", of="composable-sft", to="delta", base="base", exact=True)
    apply("base", "d.safetensors", "on")
    revert("on", "d.safetensors", "off")
    base, off = load_file("base/model.safetensors"), load_file("off/model.safetensors")
    assert all(torch.equal(base[name], off[name]) for name in base)


def test_names_with_another_stem_find_their_tensors() -> None:
    with_stack()
    path = theirs(Path("sft"), {UP.removeprefix("model."): DIFFS[UP]})
    convert(path, "d.safetensors", of="composable-sft", to="delta", base="base")
    assert UP in open_delta(Path("d.safetensors")).changes


@pytest.mark.parametrize(
    ("diffs", "told"),
    [
        (
            {"model.layers.1.mlp.upp_proj.weight": DIFFS[UP]},
            r"nearest: .*model\.layers\.1\.mlp\.up_proj",
        ),
        ({UP: ((16, 9), {143: 1.0})}, r"\[16, 9\] in what is converted, and \[16, 8\] in base"),
        ({UP: ((16, 8), {128: 1.0})}, "outside its size"),
    ],
)
def test_what_does_not_fit_the_base_is_told(diffs: Any, told: str) -> None:
    with_stack()
    path = theirs(Path("sft"), diffs)
    with pytest.raises(SourceError, match=told):
        convert(path, "d.safetensors", of="composable-sft", to="delta", base="base")
    assert not Path("d.safetensors").exists()


def test_a_pickle_that_would_run_code_is_not_read() -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("ran",))

    Path("sft").mkdir()
    torch.save({"diffs": Evil(), "abs": {}}, "sft/pytorch_diff.bin")
    result = cli(
        "delta",
        "convert",
        "sft",
        "d.safetensors",
        "--from",
        "composable-sft",
        "--to",
        "delta",
        "--base",
        "base",
    )
    assert result.exit_code == 4 and "ran" not in result.stdout
    assert "cannot be read: it holds more than tensors and numbers" in result.stderr


def test_what_must_be_named_is_asked_for() -> None:
    with pytest.raises(PlanError, match="needs --base"):
        convert("x", "d.safetensors", of="shira", to="delta")
    with pytest.raises(PlanError, match="one of --from and --to is `delta`"):
        convert("x", "y", of="shira", to="sara")
    with pytest.raises(PlanError, match="hold no places"):
        convert("x", "y", of="delta", to="sara")


# ---- SHiRA


def linear_delta() -> Path:
    tiny_llama(Path("llama"), seed=0)
    tiny_llama(Path("tuned"), seed=1)
    globs = ("*proj.weight",)
    extract("llama", "tuned", "d.safetensors", density=0.02, include=globs)
    return Path("d.safetensors")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(40).view(2, 20)).logits
    return found


def test_peft_loads_the_shira_adapter_and_says_what_base_and_delta_say() -> None:
    from peft import PeftModel

    linear_delta()
    convert("d.safetensors", "adapter", of="delta", to="shira")
    apply("llama", "d.safetensors", "on")
    base = AutoModelForCausalLM.from_pretrained("llama", dtype=torch.float32)
    served = logits(PeftModel.from_pretrained(base, "adapter"))
    wanted = logits(AutoModelForCausalLM.from_pretrained("on", dtype=torch.float32))
    assert torch.allclose(served, wanted, atol=2e-6)
    plain = logits(AutoModelForCausalLM.from_pretrained("llama", dtype=torch.float32))
    assert float((wanted - plain).abs().max()) > 1e-3


def test_shira_comes_in_again_with_its_zeros_left_out() -> None:
    linear_delta()
    convert("d.safetensors", "adapter", of="delta", to="shira")
    made = convert("adapter", "e.safetensors", of="shira", to="delta", base="llama")
    held = open_delta(Path("d.safetensors"))
    assert made.entries == sum(change.entries for change in held.changes.values())
    apply("llama", "d.safetensors", "one")
    apply("llama", "e.safetensors", "other")
    one, other = load_file("one/model.safetensors"), load_file("other/model.safetensors")
    assert all(torch.allclose(one[name], other[name], atol=1e-7) for name in one)


def test_what_shira_cannot_hold_is_refused_by_name() -> None:
    tiny_llama(Path("llama"), seed=0)
    tiny_llama(Path("tuned"), seed=1)
    extract("llama", "tuned", "d.safetensors", density=0.02)
    with pytest.raises(SourceError, match=r"is no linear layer's weight|has no place"):
        convert("d.safetensors", "adapter", of="delta", to="shira")
    assert not Path("adapter").exists() and not Path("adapter.part").exists()


# ---- SaRA


def test_sara_stands_where_the_base_is_small_in_the_models_order() -> None:
    tiny_llama(Path("llama"), seed=0)
    base = load_file("llama/model.safetensors")
    model = AutoModelForCausalLM.from_pretrained("llama", dtype=torch.float32)
    names = [name for name, _ in model.named_parameters()]
    assert names != sorted(names)  # so that an order by name would be wrong
    tau, held = 5e-3, {"threshold": 5e-3}
    wanted = {name: tensor.clone() for name, tensor in base.items()}
    for number, name in enumerate(names):
        mask = base[name].abs() < tau
        values = torch.arange(1.0, int(mask.sum()) + 1)
        held[number] = values  # type: ignore[index]
        wanted[name][mask] = values
    torch.save(held, "sara.pt")
    convert("sara.pt", "d.safetensors", of="sara", to="delta", base="llama")
    apply("llama", "d.safetensors", "on")
    on = load_file("on/model.safetensors")
    assert all(torch.equal(on[name], wanted[name]) for name in wanted)
    tiny_llama(Path("other"), seed=3)
    with pytest.raises(SourceError, match="was trained on another model"):
        convert("sara.pt", "e.safetensors", of="sara", to="delta", base="other")
