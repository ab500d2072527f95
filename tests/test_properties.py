"""Any plan over any small checkpoint: what comes out is a checkpoint of the same make."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

import mergekit_ft
from mergekit_ft import blocks
from mergekit_ft.errors import OperatorError
from tests.checkpoints import tiny_llama, write_checkpoint

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
STORED = {None: None, "float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
CODES = dict(zip(FLOATS, ("F32", "F16", "BF16", "F64"), strict=True)) | {
    torch.int64: "I64",
    torch.bool: "BOOL",
}
CELL = 65_536
LITTLE = 40_000_000  # bytes of memory, in which hardly anything is kept between passes

shapes = st.one_of(
    st.lists(st.integers(0, 7), max_size=3).map(tuple),
    st.sampled_from([(CELL,), (CELL + 1,), (257, 256)]),
)
kinds = st.sampled_from([*FLOATS, *FLOATS, torch.int64, torch.bool])
places = st.sampled_from(
    ["model.embed_tokens", "model.layers.{}.mlp", "model.layers.{}.attn", "lm_head", "model.norm"]
)


@st.composite
def makes(draw: st.DrawFn) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Draw the names, shapes and dtypes of a checkpoint; one tensor at least merges."""
    layers = draw(st.integers(1, 3))
    found = {"model.layers.0.w": ((2, 3), draw(st.sampled_from(FLOATS)))}
    for number in range(draw(st.integers(0, 5))):
        place = draw(places).format(draw(st.integers(0, layers - 1)))
        found[f"{place}.{number}.w" if "layers" in place else f"{place}.w{number}"] = (
            draw(shapes),
            draw(kinds),
        )
    return found


def tensors(make: dict[str, tuple[tuple[int, ...], torch.dtype]], seed: int) -> dict[str, Tensor]:
    """Return random floats, near for each seed, and integers that are the same for all."""
    found = {}
    for number, (name, (shape, dtype)) in enumerate(make.items()):
        rolls = torch.Generator().manual_seed(number)
        values = torch.randn(shape, generator=rolls)
        if dtype in FLOATS:
            rolls.manual_seed(1000 * seed + number)
            values = values + 0.1 * torch.randn(shape, generator=rolls)
        found[name] = (values > 0) if dtype == torch.bool else values.to(dtype)
    return found


numbers = st.floats(-2, 2).map(lambda x: round(x, 3))
weights = st.one_of(numbers, st.lists(numbers, min_size=1, max_size=4))
shares = st.floats(0, 1)
densities = st.one_of(shares, st.lists(shares, min_size=1, max_size=3))
chances = st.one_of(st.floats(0.2, 0.8), st.sampled_from([0.0, 1.0]))  # of della's entries
flags = st.booleans()

Drawn = Mapping[str, st.SearchStrategy[Any]]
WEIGHT: Drawn = {"weight": weights}
SUM: Drawn = {"normalize": flags, "lambda": weights}
SPARSE: Drawn = {**WEIGHT, "density": densities}
DROPPED: Drawn = {**SUM, "rescale": flags}
BANDS: Drawn = {**SPARSE, "gamma": densities}
PRUNED: Drawn = {**WEIGHT, "density": chances, "epsilon": st.floats(0, 0.19)}


class Method(NamedTuple):
    """What is drawn for a method, and over how many models besides a base."""

    own: Mapping[str, Any] = {}
    shared: Mapping[str, Any] = {}
    tuned: tuple[int, int] = (1, 2)
    base: tuple[bool, ...] = (True,)


METHODS = {
    # random weights may cancel, and then normalising is refused
    "linear": Method(WEIGHT, {"normalize": st.just(False)}, base=(False,)),
    "slerp": Method(shared={"t": weights}, tuned=(1, 1)),
    "nuslerp": Method(
        WEIGHT, {"nuslerp_flatten": flags, "nuslerp_row_wise": flags}, (2, 2), (True, False)
    ),
    "multislerp": Method(WEIGHT, {"normalize_weights": st.just(False)}, base=(True, False)),
    "karcher": Method(shared={"max_iter": st.integers(0, 3)}, base=(False,)),
    "task_arithmetic": Method(WEIGHT, SUM),
    "ties": Method(SPARSE, DROPPED),
    "dare_linear": Method(SPARSE, DROPPED),
    "dare_ties": Method(SPARSE, DROPPED),
    "della": Method(PRUNED, DROPPED),
    "della_linear": Method(PRUNED, DROPPED),
    "breadcrumbs": Method(BANDS, DROPPED),
    "breadcrumbs_ties": Method(BANDS, DROPPED),
    "model_stock": Method(shared={"filter_wise": flags}, tuned=(2, 2)),
    "nearswap": Method(shared={"t": weights}, tuned=(1, 1)),
    "intruder_scaling": Method(
        shared={"lambda": numbers, "which": st.sampled_from(["top", "all"])}, tuned=(1, 1)
    ),
    "consensus": Method(
        {"threshold": shares},
        {"k": st.integers(0, 3), "merge": st.sampled_from(["ta", "ties"]), "density": shares},
    ),
    "sce": Method(shared={"select_topk": shares}),
    "arcee_fusion": Method(tuned=(1, 1)),
    "ram": Method(shared={"epsilon": shares}),
    "ramplus_tl": Method(shared={"r": numbers, "alpha": shares, "epsilon": shares}),
    "passthrough": Method({"scale": weights}, tuned=(1, 1), base=(False,)),
    "lines": Method(
        shared={
            "alpha": numbers,
            "beta": numbers,
            "head": st.sampled_from(["alpha", "last", "keep", "zero"]),
        },
        tuned=(1, 1),
    ),
}


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a plan over ./base, ./m0 and ./m1, without their folder."""
    name = draw(st.sampled_from(list(METHODS)))
    method = METHODS[name]
    models: list[dict[str, Any]] = [
        {"model": f"m{i}"} for i in range(draw(st.integers(*method.tuned)))
    ]
    for model in models:
        if method.own:
            model["parameters"] = {word: draw(values) for word, values in method.own.items()}
    shared = {word: draw(values) for word, values in method.shared.items()}
    if shared.get("merge") == "ta":
        del shared["density"]  # of TIES' trim: refused without it
    found: dict[str, Any] = {"merge_method": name, "models": models}
    found |= {"parameters": shared} if shared else {}
    if draw(st.sampled_from(method.base)):
        found["base_model"] = "base"
        if draw(flags):
            found["then"] = [{"lines": {"gamma": draw(shares)}}]
    stored = draw(st.sampled_from(list(STORED)))
    return found | ({"dtype": stored} if stored else {})


def located(plan: dict[str, Any], home: Path) -> dict[str, Any]:
    """Return the plan with its models in a folder."""
    models = [model | {"model": str(home / model["model"])} for model in plan["models"]]
    base = {"base_model": str(home / plan["base_model"])} if "base_model" in plan else {}
    return plan | {"models": models} | base


def merged(plan: dict[str, Any], home: Path, **options: Any) -> Path:
    """Return the folder of a merge; one whose random values cannot be stored is passed over."""
    try:
        mergekit_ft.merge(located(plan, home), home / "OUT", allow_unchanged=True, **options)
    except OperatorError as error:
        assert not (home / "OUT").exists()
        assume("does not fit" not in str(error))
        raise
    return home / "OUT"


def contents(folder: Path) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """Return, by file, the dtype and shape of every tensor, read as others read it."""
    found: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found[path.name] = {}
            for name in file.keys():  # noqa: SIM118  (a safe_open is no mapping)
                part = file.get_slice(name)
                found[path.name][name] = (part.get_dtype(), tuple(part.get_shape()))
                assert tuple(file.get_tensor(name).shape) == tuple(part.get_shape())
    return found


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(makes(), plans(), st.integers(1, 3), st.sampled_from([1, 4]))
def test_names_shapes_dtypes_and_files_are_kept(
    make: dict[str, tuple[tuple[int, ...], torch.dtype]],
    plan: dict[str, Any],
    shards: int,
    threads: int,
) -> None:
    shards = min(shards, len(make))
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        donor = "base" if "base_model" in plan else "m0"
        for seed, name in enumerate(("base", "m0", "m1")):
            split = shards if name == donor else 1  # the others may lie otherwise
            write_checkpoint(home / name, tensors(make, seed), shards=split, config={})
        out = merged(plan, home, threads=threads)
        stored = STORED[plan.get("dtype")]
        expected = {
            file: {
                name: (stored if stored and make[name][1] in FLOATS else code, shape)
                for name, (code, shape) in inside.items()
            }
            for file, inside in contents(home / donor).items()
        }
        assert contents(out) == expected
        assert {n: c for inside in expected.values() for n, (c, _) in inside.items()} == {
            name: stored if stored and dtype in FLOATS else CODES[dtype]
            for name, (_, dtype) in make.items()
        }
        index = out / "model.safetensors.index.json"
        assert index.exists() == (shards > 1)
        if shards > 1:
            places_ = {name: file for file, inside in expected.items() for name in inside}
            assert json.loads(index.read_text())["weight_map"] == places_


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(makes(), plans(), st.integers(1, 400_000))
def test_any_shard_size_holds_the_same_tensors(
    make: dict[str, tuple[tuple[int, ...], torch.dtype]], plan: dict[str, Any], size: int
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        for seed, name in enumerate(("base", "m0", "m1")):
            write_checkpoint(home / name, tensors(make, seed), config={})
        with mergekit_ft.open_plan(located(plan, home)) as opened:
            names = set(opened)
        out = merged(plan, home, max_shard_size=size)
        inside = contents(out)
        assert {name for file in inside.values() for name in file} == names
        assert sum(map(len, inside.values())) == len(names)
        for path in out.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                held = [file.get_tensor(name) for name in inside[path.name]]
            assert len(held) == 1 or sum(tensor.nbytes for tensor in held) <= size


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    plans(),
    st.sampled_from([(3 * CELL + 5,), (4, CELL), (601, 257), (5, 3, 15_000)]),
    st.sampled_from(FLOATS),
)
def test_neither_memory_nor_threads_change_a_byte(
    plan: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        for seed, name in enumerate(("base", "m0", "m1")):
            made = tensors({"model.layers.0.w": (shape, dtype)}, seed)
            write_checkpoint(home / name, made, config={})
        file = "model.safetensors"
        with mock.patch.object(blocks, "USUAL", CELL):
            narrow = (merged(plan, home, memory=LITTLE, threads=1) / file).read_bytes()
        wide = (merged(plan, home, threads=4, overwrite=True) / file).read_bytes()
        assert narrow == wide


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("llamas")
    tiny_llama(home / "base", shards=3)
    tiny_llama(home / "m0", seed=1)
    tiny_llama(home / "m1", seed=2, shards=2)
    return home


@settings(max_examples=16, deadline=None, suppress_health_check=list(HealthCheck))
@given(plans())
def test_a_merged_llama_loads_and_speaks(llamas: Path, plan: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        for name in ("base", "m0", "m1"):
            (home / name).symlink_to(llamas / name)
        out = merged(plan, home)
        model, told = AutoModelForCausalLM.from_pretrained(
            out, output_loading_info=True, dtype="auto"
        )
        assert not any(told.values())
        with mergekit_ft.open_plan(located(plan, home)) as opened:
            state = model.state_dict()
            assert set(opened) <= set(state)
            assert all(torch.equal(state[name], opened[name]) for name in opened)
        logits = model(torch.arange(8)[None]).logits
        assert logits.shape == (1, 8, model.config.vocab_size)
