"""What every registered operator owes: parameters, blocks, devices, its card and its plan."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import mergekit_ft
from mergekit_ft import registry
from mergekit_ft.contract import (
    CELL,
    About,
    Adjustment,
    Base,
    Block,
    Finding,
    Measure,
    Operator,
    Place,
    Survey,
)
from mergekit_ft.deltas.extract import extract
from mergekit_ft.layers import places
from mergekit_ft.plan import read
from mergekit_ft.plan.fields import parameters_of
from tests.cards import SECTIONS, section, shown, table
from tests.checkpoints import tiny_llama
from tests.merging import part_of, vectors

ROOT = Path(__file__).resolve().parents[1]
NAMES = registry.names("operator")
OPERATORS = [name for name in NAMES if issubclass(registry.method(name), Operator)]
TENSOR = "model.layers.1.mlp.up_proj.weight"
PLACE = Place("block", "model.layers", 1, 3)
SHAPE = (244, 269)
N = CELL + 100  # what a tensor of that shape holds


def folder(name: str) -> Path:
    return ROOT / "methods" / name


# --- parameters ---------------------------------------------------------------------------------


def test_there_are_operators() -> None:
    assert len(OPERATORS) >= 7


@pytest.mark.parametrize("name", OPERATORS)
def test_every_parameter_says_what_it_is_and_for_what_it_is_one(name: str) -> None:
    for word, field in registry.method(name).model_fields.items():
        assert field.description, word
        extra = field.json_schema_extra
        assert isinstance(extra, dict), word
        assert extra.get("scope") in ("model", "tensor", "plan"), word
        per_model = get_origin(field.annotation) is tuple
        assert per_model == (extra["scope"] == "model"), word


# --- blocks -------------------------------------------------------------------------------------


def choices(operator: type[Operator]) -> dict[str, list[Any]]:
    """Return, by field, the values that a bool or a Literal can have."""
    found = {}
    for word, field in operator.model_fields.items():
        if field.annotation is bool:
            found[word] = [False, True]
        elif get_origin(field.annotation) is Literal:
            found[word] = list(get_args(field.annotation))
    return found


def variants(name: str) -> Iterator[Operator]:
    """Yield the operator of the method's own plan, and with each of its choices made otherwise."""
    lookup = read(str(folder(name) / "plan.yaml")).lookup
    assert lookup is not None
    plain = lookup.operator(TENSOR, PLACE)
    assert plain is not None
    plain = plain.seated({TENSOR: PLACE})
    yield plain
    given = {word: getattr(plain, word) for word in type(plain).model_fields}
    for word, values in choices(type(plain)).items():
        for value in values:
            with suppress(ValidationError):  # it may exclude what the plan says elsewhere
                yield type(plain)(**(given | {word: value})).seated({TENSOR: PLACE})


VARIANTS = [
    pytest.param(operator, id=f"{name}-{number}")
    for name in OPERATORS
    for number, operator in enumerate(dict.fromkeys(variants(name)))
]

ADJUSTMENTS = [v for v in VARIANTS if isinstance(v.values[0], Adjustment)]


def models_of(operator: Operator) -> int:
    """Return how many models the operator's parameters are for."""
    rows = [v for v in vars(operator).values() if isinstance(v, tuple)]
    least, most = operator.tuned
    return len(rows[0]) if rows else (most or max(least, 2))


def block(operator: Operator, dtype: torch.dtype = torch.float32, fill: float = 0.0) -> Block:
    k = models_of(operator)
    base, *tuned = vectors(k, N, seed=1, dtype=dtype)
    apart = operator.base is not Base.IGNORED or isinstance(operator, Adjustment)
    return Block(
        name=TENSOR,
        shape=SHAPE,
        start=0,
        base=base if apart else base[:0],
        tuned=torch.stack(tuned),
        ids=tuple(f"./model{i}" for i in range(k)),
        place=PLACE,
        first_cell=0,
        scratch=torch.full((operator.scratch(k), N), fill, dtype=dtype),
        cell=operator.grain.cell(SHAPE),
    )


def about(operator: Operator, dtype: torch.dtype = torch.float32, finding: Any = None) -> About:
    ids = tuple(f"./model{i}" for i in range(models_of(operator)))
    bits = 64 if dtype == torch.float64 else 32
    cell = operator.grain.cell(SHAPE)
    return About(ids, N, TENSOR, PLACE, bits, finding, shape=SHAPE, cell=cell)


class Pass(NamedTuple):
    """One pass of a survey over one block: what was asked, and what came of it."""

    measures: tuple[Measure, ...]
    totals: tuple[Tensor, ...]  # as the device gave them


def passes(survey: Survey, of: Block) -> tuple[list[Pass], Finding]:
    """Drive a survey over one block; return its passes and what it finds."""
    seen = []
    try:
        measures = next(survey)
        while True:
            seen.append(Pass(measures, tuple(measure.of(of).clone() for measure in measures)))
            measures = survey.send(tuple(part_of(measure, of) for measure in measures))
    except StopIteration as stop:
        return seen, stop.value


def measured_and_merged(
    operator: Operator, dtype: torch.dtype = torch.float32, fill: float = 0.0
) -> tuple[list[Pass], Finding, Tensor]:
    seen, finding = passes(operator.survey(about(operator, dtype)), block(operator, dtype, fill))
    return seen, finding, operator.merge(block(operator, dtype, fill), finding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("operator", VARIANTS)
def test_merging_a_block_is_the_float64_reference(operator: Operator, dtype: torch.dtype) -> None:
    _, finding, merged = measured_and_merged(operator, dtype, torch.nan)
    of = block(operator, torch.float64)
    known = about(operator, dtype, finding if operator.survey_scope == "model" else None)
    shaped = [x.view(SHAPE) if x.numel() else x for x in (of.base, *of.tuned)]
    plain = operator.reference(shaped[0], shaped[1:], known).flatten()
    close = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(merged.double(), plain, rtol=close, atol=close)


@pytest.mark.parametrize("operator", VARIANTS)
def test_a_merge_returns_its_elements_and_leaves_the_base_alone(operator: Operator) -> None:
    _, finding = passes(operator.survey(about(operator)), block(operator))
    given = block(operator)
    merged = operator.merge(given, finding)
    assert (merged.shape, merged.dtype) == ((N,), torch.float32)
    assert torch.equal(given.base, block(operator).base)


@pytest.mark.parametrize("operator", VARIANTS)
def test_a_measure_overwrites_nothing_but_scratch(operator: Operator) -> None:
    given, fresh = block(operator), block(operator)
    passes(operator.survey(about(operator)), given)
    if isinstance(operator, Adjustment):
        given.delta = torch.ones(N)
        passes(operator.follow(about(operator)), given)
        assert torch.equal(given.delta, torch.ones(N))
    assert torch.equal(given.base, fresh.base)
    assert torch.equal(given.tuned, fresh.tuned)


@pytest.mark.parametrize("operator", VARIANTS)
def test_a_measure_of_cells_is_float64_and_has_a_row_for_each(operator: Operator) -> None:
    seen, _, _ = measured_and_merged(operator)
    for measure, total in ((m, t) for each in seen for m, t in zip(*each, strict=True)):
        if measure.host is not None:
            assert total.is_floating_point()
        elif measure.cells:
            assert (total.dtype, total.shape[0]) == (torch.float64, 2)
        else:
            assert not total.dtype.is_floating_point


@pytest.mark.parametrize("operator", VARIANTS)
def test_what_lay_in_scratch_before_changes_nothing(operator: Operator) -> None:
    _, _, one = measured_and_merged(operator, fill=torch.nan)
    _, _, other = measured_and_merged(operator, fill=1.0)
    assert torch.equal(one, other)


# --- devices: no operator forces the CPU --------------------------------------------------------


class WithoutCuda(TorchFunctionMode):
    """Do what a torch built without CUDA cannot, even with fake tensors: index, copy, and find."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.__getitem__:
            return indexed(*args)
        if func is torch.arange and "out" in (kwargs or {}):
            func, args = torch.Tensor.copy_, (kwargs["out"], func(*args, device="cuda"))
        if func is torch.Tensor.copy_:
            to, source = args[:2]
            assert to.device == source.device
            assert torch.broadcast_shapes(to.shape, source.shape) == to.shape
            return to
        if func is torch.Tensor.nonzero:  # how many there are only real values could tell
            return torch.empty((3, args[0].dim()), dtype=torch.int64, device=args[0].device)
        result = func(*args, **(kwargs or {}))
        assert not isinstance(result, Tensor) or result.device.type == "cuda", func
        return result


def indexed(tensor: Tensor, index: Any) -> Tensor:
    axis = 0
    for item in index if isinstance(index, tuple) else (index,):
        if isinstance(item, slice):
            tensor = torch.ops.aten.slice(tensor, axis, item.start, item.stop, item.step or 1)
            axis += 1
        else:
            tensor = tensor.select(axis, item)
    return tensor


def fake(real: Block) -> Block:
    """Return a block of the same shapes on a GPU that does not exist."""
    gpu = torch.device("cuda", 0)

    def like(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=gpu)

    tensors = {word: like(getattr(real, word)) for word in ("base", "tuned", "scratch")}
    delta = None if real.delta is None else like(real.delta)
    rest = {word: getattr(real, word) for word in ("name", "shape", "start", "ids", "place")}
    return Block(**tensors, **rest, first_cell=0, delta=delta, cell=real.cell)


def require_same_kind(result: Tensor, real: Tensor) -> None:
    assert result.device == torch.device("cuda", 0)
    assert (result.shape, result.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("operator", VARIANTS)
def test_an_operator_stays_on_the_device_of_its_block(
    operator: Operator, dtype: torch.dtype
) -> None:
    seen, finding, merged = measured_and_merged(operator, dtype)
    given = block(operator, dtype)
    with FakeTensorMode(), WithoutCuda():
        for measures, totals in seen:
            for measure, total in zip(measures, totals, strict=True):
                require_same_kind(measure.of(fake(given)), total)
        require_same_kind(operator.merge(fake(given), finding), merged)


@pytest.mark.parametrize("operator", ADJUSTMENTS)
def test_an_adjustment_stays_on_the_device_of_its_block(operator: Adjustment) -> None:
    auto = operator.model_copy(update={"alpha": "auto", "beta": 0.5, "gamma": None})
    given = block(auto)
    given.delta = torch.ones(N)
    seen, finding = passes(auto.follow(about(auto)), given)
    assert seen
    with FakeTensorMode(), WithoutCuda():
        for measures, totals in seen:
            for measure, total in zip(measures, totals, strict=True):
                require_same_kind(measure.of(fake(given)), total)
        require_same_kind(auto.adjust(fake(given), finding), given.delta)


def test_a_device_that_is_forced_would_be_seen() -> None:
    # what the two tests above rest on: a number that is read, or a tensor of the CPU, fails
    with FakeTensorMode(), WithoutCuda():
        tensor = torch.ones(4, device="cuda")
        with pytest.raises(RuntimeError):
            float(tensor.sum())
        for forced in (lambda: tensor.cpu(), lambda: torch.ones(4), lambda: tensor.to("cpu")):
            with pytest.raises(AssertionError):
                forced()


# --- cards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_card_has_its_sections_in_order(name: str) -> None:
    assert tuple(re.findall(r"^## (.+)$", registry.card(name), re.M)) == SECTIONS
    assert all(section(name, title).strip() for title in SECTIONS)


@pytest.mark.parametrize("name", NAMES)
def test_a_card_computes_in_three_lines_and_cites_in_bibtex(name: str) -> None:
    assert len(section(name, "What it computes").strip().splitlines()) <= 3
    assert re.search(r"```bibtex\n@\w+\{\w+,\n.*\n```", section(name, "Citation"), re.S)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_card_lists_every_parameter_with_its_default_and_no_other(name: str) -> None:
    listed = {row[0].strip("`"): row[3] for row in table(name, "Parameters")}
    known = parameters_of(registry.method(name))
    assert listed == {word: shown(parameter.default) for word, parameter in known.items()}
    assert all(row[1] and row[2] for row in table(name, "Parameters"))


@pytest.mark.parametrize("name", NAMES)
def test_a_card_names_code_that_exists(name: str) -> None:
    named = [cell for _, cell in table(name, "Paper to code")]
    module = __import__(f"mergekit_ft.methods.{name}.{name}", fromlist=[name])
    for dotted in re.findall(r"`([\w.]+)`", " ".join(named)):
        found: Any = module
        for word in dotted.split("."):
            assert hasattr(found, word), f"{name}: {dotted}"
            found = getattr(found, word)
    assert all("`" in cell for cell in named)


# --- plans --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the checkpoints and the deltas that the methods' plans name."""
    home = tmp_path_factory.mktemp("plans")
    for seed, name in enumerate(("base", "maths", "chat")):
        tiny_llama(home / name, seed=seed, layers=2)
    for name in ("maths", "chat"):
        extract(str(home / "base"), str(home / name), home / f"{name}.safetensors", density=0.01)
    return home


@pytest.mark.parametrize("name", NAMES)
def test_a_methods_plan_runs_and_changes_the_base(
    name: str, laid_out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(laid_out)
    result = mergekit_ft.merge(folder(name) / "plan.yaml", tmp_path / "OUT")
    assert result.changed > 0
    with mergekit_ft.open_plan(folder(name) / "plan.yaml") as merged:
        assert places(merged)[TENSOR].layers == 2
        assert all(bool(tensor.isfinite().all()) for tensor in merged.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_a_plan_says_where_it_is_from(name: str) -> None:
    lines = (folder(name) / "plan.yaml").read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(rf"# mergekit-ft merge methods/{name}/plan\.yaml OUT", lines[0])
    for line in lines[1:]:
        words, _, said = line.partition("#")
        if re.search(r":\s*-?[0-9.]+\b", words):
            assert re.search(r"ours|paper|et al\.", said), line
