"""Parameters: settings, levels, what each tensor gets, and words that decide nothing."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, model_validator

from mergekit_ft import registry
from mergekit_ft.contract import Adjustment, Base, Operator, per_model, setting, shared
from mergekit_ft.layers import Place, places
from mergekit_ft.plan import Lookup, read, schema


class Deltas(Operator):
    weight: tuple[float, ...] = per_model()
    density: tuple[Annotated[float, Field(gt=0, le=1)], ...] = per_model(1.0)
    normalize: bool = shared(True)
    lambda_: float = shared(1.0, alias="lambda")
    rounds: int = shared(1, ge=1)
    mode: Literal["fast", "slow"] = shared("fast")
    scope: Literal["tensor", "model"] = setting("tensor")


class Mean(Operator):
    base: ClassVar[Base] = Base.IGNORED
    weight: tuple[float, ...] = per_model()

    @model_validator(mode="after")
    def _check(self) -> Mean:
        if sum(self.weight) == 0:
            raise ValueError("the weights sum to zero")
        return self


class Lift(Adjustment):
    alpha: float | Literal["auto"] = setting("auto")
    beta: float = shared(0.0)
    share: tuple[float, ...] = per_model(1.0)


METHODS: dict[str, type[Operator]] = {"deltas": Deltas, "mean": Mean, "lift": Lift}

# A stack of five layers (depths 0, 1/4, 1/2, 3/4, 1) and three tensors outside it.
PLACES = places(
    [f"h.{i}.{part}.w" for i in range(5) for part in ("attn", "mlp.up")]
    + ["wte.weight", "ln_f.weight", "lm_head.weight"]
)


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "method", METHODS.__getitem__)
    monkeypatch.setattr(registry, "names", lambda kind=None: sorted(METHODS))


def deltas(own: str = "1", top: str = "", more: str = "") -> str:
    """Return a plan of two tuned models; the first one's weight is `own`."""
    return (
        "merge_method: deltas\n"
        "base_model: base\n"
        "models:\n"
        f"  - {{model: a, parameters: {{weight: {own}}}}}\n"
        "  - {model: b, parameters: {weight: 2}}\n"
        f"parameters: {{{top}}}\n{more}"
    )


def lookup(text: str) -> Lookup:
    reading = read(text)
    assert [str(fault) for fault in reading.faults] == []
    assert reading.lookup is not None
    return reading.lookup


def value(text: str, name: str, field: str) -> Any:
    return lookup(text).resolve(name, PLACES[name])[field]


def faults(text: str) -> list[str]:
    return [str(fault) for fault in read(text).faults]


def idle(text: str) -> list[str]:
    """Return every fault after all tensors were asked for."""
    reading = read(text)
    assert reading.lookup is not None
    for name, place in PLACES.items():
        reading.lookup.resolve(name, place)
    return [str(fault) for fault in [*reading.faults, *reading.lookup.unused()]]


# ---- settings


def test_a_scalar_is_for_every_tensor_and_each_model_has_its_own() -> None:
    found = lookup(deltas("0.25")).resolve("wte.weight", PLACES["wte.weight"])
    assert found == {
        "weight": (0.25, 2.0),
        "density": (1.0, 1.0),
        "normalize": True,
        "lambda_": 1.0,
        "rounds": 1,
        "mode": "fast",
        "scope": "tensor",
    }


@pytest.mark.parametrize(("layer", "expected"), [(0, 0.0), (1, 0.5), (2, 1.0), (3, 0.5), (4, 0.0)])
def test_a_gradient_is_linear_between_its_values_over_the_layers(
    layer: int, expected: float
) -> None:
    # [0, 1, 0] at t: s = 2t; between values 0 and 1 up to t = 1/2, then down again.
    assert value(deltas("[0, 1, 0]"), f"h.{layer}.attn.w", "weight")[0] == expected


def test_a_gradient_outside_the_stack_is_its_first_value_even_for_the_head() -> None:
    for name in ("wte.weight", "ln_f.weight", "lm_head.weight"):
        assert value(deltas("[3, 4]"), name, "weight")[0] == 3.0


def test_a_gradient_over_one_layer_is_its_last_value() -> None:
    assert lookup(deltas("[3, 4]")).resolve("h.0.w", Place("block", "h", 0, 1))["weight"][0] == 4.0


def test_a_gradient_of_words_or_flags_picks_and_does_not_mix() -> None:
    # t = 3/4 over two values: index trunc(0.75 * 1) = 0; t = 1: index 1
    text = deltas(top="mode: [fast, slow], normalize: [yes, no]")
    assert [value(text, f"h.{i}.attn.w", "mode") for i in (0, 3, 4)] == ["fast", "fast", "slow"]
    assert [value(text, f"h.{i}.attn.w", "normalize") for i in (3, 4)] == [True, False]


def test_a_list_of_one_is_a_scalar() -> None:
    assert value(deltas("[7]"), "h.3.attn.w", "weight")[0] == 7.0


def test_a_filter_is_a_case_sensitive_substring_and_the_first_that_holds_wins() -> None:
    text = deltas("[{filter: mlp, value: 5}, {filter: w, value: 6}, {filter: MLP, value: 7}]")
    assert value(text, "h.0.mlp.up.w", "weight")[0] == 5.0
    assert value(text, "h.0.attn.w", "weight")[0] == 6.0


@pytest.mark.parametrize("everything", ["{value: 9}", "{value: 9, filter: '*'}"])
def test_an_entry_without_filter_or_with_a_star_is_for_all(everything: str) -> None:
    text = deltas(f"[{{filter: mlp, value: 5}}, {everything}]")
    assert value(text, "wte.weight", "weight")[0] == 9.0


def test_one_entry_may_stand_alone() -> None:
    assert value(deltas("{value: [0, 4], filter: '*'}"), "h.1.attn.w", "weight")[0] == 1.0


def test_match_is_a_glob_over_the_whole_name() -> None:
    text = deltas("[{match: 'h.[01].*', value: 5}, {value: 6}]")
    found = [value(text, name, "weight")[0] for name in ("h.1.attn.w", "h.2.attn.w", "wte.weight")]
    assert found == [5.0, 6.0, 6.0]


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("1..3", [1, 2, 3]),
        ("2", [2]),
        ("3..", [3, 4]),
        ("..1", [0, 1]),
        ("'0 .. 1'", [0, 1]),
        ("0..0", [0]),
    ],
)
def test_layers_are_a_range_with_both_ends(layers: str, chosen: list[int]) -> None:
    text = deltas(f"[{{layers: {layers}, value: 5}}, {{value: 6}}]")
    assert [i for i in range(5) if value(text, f"h.{i}.attn.w", "weight")[0] == 5.0] == chosen
    assert value(text, "wte.weight", "weight")[0] == 6.0


def test_all_selectors_of_one_entry_must_hold() -> None:
    text = deltas("[{filter: mlp, layers: 1.., match: '*up*', value: 5}, {value: 6}]")
    found = [value(text, f"h.{x}.w", "weight")[0] for x in ("0.mlp.up", "1.attn", "1.mlp.up")]
    assert found == [6.0, 6.0, 5.0]


# ---- levels


def test_where_no_entry_of_the_model_matches_the_whole_plan_decides_then_the_default() -> None:
    text = (
        "merge_method: deltas\n"
        "base_model: base\n"
        "models:\n"
        "  - model: a\n"
        "    parameters: {weight: 1, density: {filter: mlp, value: 0.1}}\n"
        "parameters: {density: {filter: h.0, value: 0.2}}\n"
    )
    found = [value(text, n, "density") for n in ("h.0.mlp.up.w", "h.0.attn.w", "h.1.attn.w")]
    assert found == [(0.1,), (0.2,), (1.0,)]


def test_a_required_parameter_that_no_level_gives_is_a_fault_for_each_model() -> None:
    text = "merge_method: deltas\nbase_model: x\nmodels:\n  - model: a\n  - model: b\n"
    assert faults(text) == [
        "plan:4:5: missing required parameter 'weight' for a; write it under its `parameters:` or"
        " the top-level `parameters:`",
        "plan:5:5: missing required parameter 'weight' for b; write it under its `parameters:` or"
        " the top-level `parameters:`",
    ]


def test_a_required_parameter_whose_entries_leave_a_tensor_out_is_a_fault_once() -> None:
    assert idle(deltas("[{filter: mlp, value: 5}]")) == [
        "plan:4:29: missing required parameter 'weight' for a at h.0.attn.w;"
        " add an entry without a filter, or a value for all models"
    ]


def test_a_broken_value_is_not_a_missing_one_too() -> None:
    assert idle(deltas("x")) == ["plan:4:37: weight must be a number; got 'x'"]


def test_parameters_of_the_base_have_no_effect_where_it_is_apart() -> None:
    text = deltas().replace("parameters: {}", "") + "  - {model: base, parameters: {weight: 1}}\n"
    assert faults(text) == [
        "plan:7:19: parameters of the base model have no effect in deltas; remove them"
    ]


def test_a_shared_parameter_under_a_model_has_no_effect() -> None:
    for word in ("normalize", "scope"):
        assert faults(deltas(f"1, {word}: 1")) == [
            f"plan:4:40: '{word}' is one value for all models, without effect under one;"
            " move it to the top-level `parameters:`"
        ]


# ---- values


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ("1, density: 0", "4:49: density must be greater than 0; got 0"),
        ("1, density: 1.5", "4:49: density must be at most 1; got 1.5"),
        ("true", "4:37: weight must be a number; got true"),
        ("", "4:36: weight must be a number; got nothing"),
        (".nan", "4:37: weight must be finite; got nan"),
        ("[1, x]", "4:41: weight must be a number; got 'x'"),
        ("[[1]]", "4:38: weight must be a number; got a list"),
        ("[]", "4:37: an empty list gives weight no value"),
        ("[1, {value: 2}]", "4:38: a list holds numbers (a gradient) or entries with `value:`"),
        ("[{filter: mlp}]", "4:38: this entry of weight has no `value:`"),
        ("{value: 1, fliter: mlp}", "4:48: unknown key 'fliter' in an entry of weight; did you"),
        ("{value: 1, layers: 5..2}", "4:56: layers 5..2 is empty; write 2..5"),
        ("{value: 1, layers: a}", "layers is a number or a range (4..12, 4.., ..12); got 'a'"),
        ("{value: 1, layers: '..'}", "layers is a number or a range (4..12, 4.., ..12); got '..'"),
        ("{value: 1, layers: [1]}", "4:56: layers must be text; got a list"),
        ("{value: 1, filter: [a]}", "4:56: filter must be text; got a list"),
        ("{value: 1, match: ''}", "4:55: match must be text; got ''"),
        (
            "1, lamda: 1",
            "4:40: unknown key 'lamda' under parameters; did you mean 'lambda'? (deltas",
        ),
    ],
)
def test_a_value_that_does_not_fit_is_one_fault_in_plain_words(own: str, told: str) -> None:
    (found,) = faults(deltas(own))
    assert told in found


@pytest.mark.parametrize(
    ("top", "told"),
    [
        ("lambda_: 1", "6:14: unknown key 'lambda_' under parameters; did you mean 'lambda'?"),
        ("normalize: 2", "6:25: normalize must be true or false; got 2"),
        ("rounds: 1.5", "6:22: rounds must be a whole number; got 1.5"),
        (
            "rounds: [1, 4]",
            "6:22: rounds takes whole numbers: a gradient gives others; use `layers:`",
        ),
        ("mode: slwo", "6:20: mode must be 'fast' or 'slow'; got 'slwo'; did you mean 'slow'?"),
        ("scope: [model]", "6:21: scope has one value for the whole plan: no gradient, no filter"),
        ("scope: {value: model}", "6:21: scope has one value for the whole plan"),
        (
            "dtype: float32",
            "6:14: unknown key 'dtype' under parameters; it belongs at the top level",
        ),
    ],
)
def test_a_value_for_all_models_that_does_not_fit_is_one_fault(top: str, told: str) -> None:
    (found,) = faults(deltas(top=top))
    assert told in found


def test_an_unknown_parameter_lists_the_valid_ones() -> None:
    (found,) = faults(deltas(top="consensus_method: sum"))
    assert found.endswith("(deltas takes: weight, density, normalize, lambda, rounds, mode, scope)")


# ---- then


def test_a_word_that_mergekit_takes_and_never_reads_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Deltas, "without_effect", {"rescale": "it drops nothing"})
    said = "'rescale' has no effect in deltas: it drops nothing; remove it"
    assert faults(deltas("1, rescale: true", "rescale: false")) == [
        f"plan:4:40: {said}",
        f"plan:6:14: {said}",
    ]


def test_a_step_has_settings_like_any_method() -> None:
    steps = "then:\n  - lift: {beta: [0, 4]}\n  - lift: {alpha: 2, beta: {value: 7}}\n"
    first, second = (lookup(deltas(more=steps)).for_then(i) for i in (0, 1))
    place = PLACES["h.1.attn.w"]
    expected = {"alpha": "auto", "beta": 1.0, "share": (1.0, 1.0)}
    assert first.resolve("h.1.attn.w", place) == expected
    assert second.resolve("h.1.attn.w", place) == {"alpha": 2.0, "beta": 7.0, "share": (1.0, 1.0)}


def test_faults_of_a_step_are_told_at_their_place() -> None:
    steps = "then:\n  - lift: {alpha: atuo, bta: 1}\n"
    assert faults(deltas(more=steps)) == [
        "plan:8:19: alpha must be a number or 'auto'; got 'atuo'; did you mean 'auto'?",
        "plan:8:25: unknown key 'bta' under lift; did you mean 'beta'?"
        " (lift takes: alpha, beta, share)",
    ]


def test_a_step_that_cannot_be_has_no_operator_and_does_not_stop_the_report() -> None:
    reading = read(deltas(more="then:\n  - mean\n"))
    assert reading.lookup is not None
    assert reading.lookup.for_then(0).operator("h.0.attn.w", PLACES["h.0.attn.w"]) is None
    assert reading.lookup.for_then(0).resolve("h.0.attn.w", PLACES["h.0.attn.w"]) == {}
    assert [fault.line for fault in reading.faults] == [8]


def test_a_selector_of_a_step_that_matches_nothing_is_told() -> None:
    reading = read(deltas(more="then:\n  - lift: {beta: {value: 1, filter: nope}}\n"))
    assert reading.lookup is not None
    for name, place in PLACES.items():
        reading.lookup.resolve(name, place)
        reading.lookup.for_then(0).resolve(name, place)
    (fault,) = reading.lookup.unused()
    assert str(fault).startswith("plan:8:37: filter 'nope' matches no tensor; names are like h.0.")


# ---- words that decide nothing


def test_a_plan_in_which_every_word_counts_has_no_idle_word() -> None:
    assert idle(deltas("[{filter: mlp, value: 5}, {value: [0, 1]}]", top="lambda: 2")) == []


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("filter: mpl.up", "4:47: filter 'mpl.up' matches no tensor; nearest: mlp.up"),
        ("filter: Mlp", "filter 'Mlp' matches no tensor; nearest: mlp"),
        ("filter: 'mlp.*'", "for a glob write `match: '*mlp.*'`"),
        ("match: mlp.up", "a glob is for the whole name: write `match: '*mlp.up*'`"),
        ("match: 'h.*.attention.w'", "matches no tensor; nearest names: h.0.attn.w"),
        ("layers: 7..9", "4:47: layers 7..9 matches no tensor; layers are h 0..4"),
        ("filter: wte, layers: 1", "filter 'wte' with layers 1 matches no tensor: each part matc"),
    ],
)
def test_a_selector_that_matches_nothing_is_told_with_what_would(entry: str, told: str) -> None:
    (found,) = idle(deltas(f"[{{{entry}, value: 5}}, {{value: 6}}]"))
    assert told in found


def test_an_entry_that_earlier_ones_shadow_is_told() -> None:
    assert idle(deltas("[{value: 5}, {filter: mlp, value: 6}]")) == [
        "plan:4:50: this entry never decides: earlier ones take every tensor it is for; remove it"
    ]


def test_a_level_that_every_model_overrides_is_told() -> None:
    (found,) = idle(deltas(top="weight: 3"))
    assert found.startswith("plan:6:14: 'weight' has no effect here: every tensor's value comes")


# ---- instances


def test_like_tensors_share_one_operator() -> None:
    found = lookup(deltas("[{filter: mlp, value: 5}, {value: 6}]"))
    names = ("h.0.mlp.up.w", "h.1.mlp.up.w", "h.0.attn.w")
    first, second, third = (found.operator(name, PLACES[name]) for name in names)
    assert first is second
    assert isinstance(first, Deltas)
    assert isinstance(third, Deltas)
    assert (first.weight, third.weight) == ((5.0, 2.0), (6.0, 2.0))


def test_values_that_contradict_each_other_are_a_fault_once() -> None:
    text = "merge_method: mean\nmodels: [{model: a}, {model: b}]\nparameters: {weight: [0, 0.0]}\n"
    reading = read(text)
    assert reading.lookup is not None
    assert all(reading.lookup.operator(n, p) is None for n, p in PLACES.items())
    assert [str(fault) for fault in reading.faults] == [
        "plan:1:15: mean at h.0.attn.w: the weights sum to zero"
    ]


def test_a_hundred_thousand_tensors_are_resolved_in_seconds() -> None:
    names = [f"h.{i}.experts.{j}.w" for i in range(100) for j in range(1000)]
    entries = (
        "[{match: '*.experts.1?.w', value: [0, 1]}, {filter: experts.2, value: 3}, {value: 4}]"
    )
    found, stands = lookup(deltas(entries)), places(names)
    start = time.perf_counter()
    for name in names:
        found.resolve(name, stands[name])
    assert found.unused() == []
    assert time.perf_counter() - start < 5.0  # seconds; 0.4 on two slow cores


# ---- the methods that ship


def test_every_method_that_ships_says_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = schema()
    json.dumps(found)
    for name in registry.names("operator"):
        taken = set(found["definitions"][f"{name}.shared"]["properties"])
        fields = registry.method(name).model_fields
        assert taken == {field.alias or word for word, field in fields.items()}


def test_task_arithmetic_with_lines_gives_every_tensor_its_operators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    found = lookup(
        "merge_method: task_arithmetic\n"
        "base_model: ./base\n"
        "models:\n"
        "  - {model: ./maths, parameters: {weight: [0.2, 0.8]}}\n"
        "  - {model: ./chat, parameters: {weight: 0.5}}\n"
        "then:\n"
        "  - lines: {alpha: auto, beta: 0.5}\n"
    )
    for name, place in PLACES.items():
        assert found.operator(name, place) is not None
        assert found.for_then(0).operator(name, place) is not None
    assert found.resolve("h.2.attn.w", PLACES["h.2.attn.w"])["weight"] == (0.5, 0.5)
    assert found.unused() == []
