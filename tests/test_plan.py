"""Plans: what is read, and every fault with its place and the word that would do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field

from mergekit_ft import registry
from mergekit_ft.contract import Adjustment, Base, Operator, per_model, setting, shared
from mergekit_ft.errors import PlanError
from mergekit_ft.layers import Place
from mergekit_ft.plan import ModelReference, Reading, read, schema


class Deltas(Operator):
    weight: tuple[float, ...] = per_model(description="factor")
    density: tuple[Annotated[float, Field(gt=0, le=1)], ...] = per_model((1.0,))
    normalize: bool = shared(True)
    lambda_: float = shared(1.0, alias="lambda")
    scope: Literal["tensor", "model"] = setting("tensor")


class Mean(Operator):
    base: ClassVar[Base] = Base.IGNORED
    weight: tuple[float, ...] = per_model()
    steps: int = shared(1, ge=1)


class Pair(Operator):
    tuned: ClassVar[tuple[int, int | None]] = (1, 1)
    t: float = shared()


class Lift(Adjustment):
    alpha: float | Literal["auto"] = setting("auto")
    beta: float = shared(0.0)


PLACE = Place()
METHODS: dict[str, type[Operator]] = {"deltas": Deltas, "mean": Mean, "pair": Pair, "lift": Lift}


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    def method(name: str) -> type[Operator]:
        if name not in METHODS:
            raise PlanError(f"unknown method '{name}'{registry.did_you_mean(name, METHODS)}")
        return METHODS[name]

    monkeypatch.setattr(registry, "method", method)
    monkeypatch.setattr(registry, "names", lambda kind=None: sorted(METHODS))
    monkeypatch.setattr(registry, "summary", lambda name: f"About {name}.")


def faults(plan: Any) -> list[str]:
    return [str(fault) for fault in read(plan).faults]


def good(plan: Any) -> Reading:
    reading = read(plan)
    assert [str(fault) for fault in reading.faults] == []
    assert reading.plan is not None
    return reading


MEAN = "merge_method: mean\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"  # three lines


# ---- what is read


def test_the_plan_of_the_readme_is_read_whole() -> None:
    text = (
        "merge_method: deltas   # a comment\n"
        "base_model: ./base\n"
        "models:\n"
        "  - {model: ./maths, parameters: {weight: [0.2, 0.8]}}\n"
        "  - {model: org/chat@v2, parameters: {weight: 0.5}}\n"
        "dtype: float32\n"
        "out_dtype: torch.bfloat16\n"
        "then:\n"
        "  - lift: {alpha: auto, beta: 0.5}\n"
        "  - lift\n"
    )
    plan = good(text).accepted()
    assert [str(entry.model) for entry in plan.models] == ["./maths", "org/chat@v2"]
    assert plan.models[1].model.revision == "v2"
    assert [(step.method, step.parameters) for step in plan.then] == [
        ("lift", {"alpha": "auto", "beta": 0.5}),
        ("lift", {}),
    ]
    assert plan.stored_dtype == "bfloat16"
    assert plan.text == text
    assert plan.file == "plan"


def test_a_plan_may_be_a_file_a_text_or_a_mapping(tmp_path: Path) -> None:
    file = tmp_path / "plan.yml"
    file.write_text(MEAN)
    mapping = {"merge_method": "mean", "models": [{"model": "a", "parameters": {"weight": 1}}]}
    plans = [good(given).accepted() for given in (file, str(file), MEAN, mapping)]
    assert all(plan.model_dump() == plans[0].model_dump() for plan in plans)
    assert [plan.file for plan in plans] == [str(file), str(file), "plan", "plan"]


def test_a_mapping_may_hold_paths_and_tuples(tmp_path: Path) -> None:
    entry = {"model": tmp_path, "parameters": {"weight": (0, 1)}}
    plan = good({"merge_method": "mean", "models": (entry,)}).accepted()
    assert plan.models[0].model.path == str(tmp_path)
    assert "merge_method: mean" in plan.text


def test_dtype_alone_is_the_stored_dtype() -> None:
    assert good(MEAN + "dtype: torch.float16").accepted().stored_dtype == "float16"
    assert good(MEAN).accepted().stored_dtype is None


def test_null_is_as_good_as_absent() -> None:
    good(MEAN + "base_model:\nparameters:\ndtype: null\nthen:\nname: ~\n")


# ---- YAML


def test_numbers_with_an_exponent_are_numbers() -> None:
    plan = good("merge_method: mean\nmodels: [{model: a, parameters: {weight: 1e-5}}]").accepted()
    assert plan.models[0].parameters["weight"] == 1e-5


def test_no_and_times_stay_text_and_names_keep_their_spelling() -> None:
    text = "merge_method: mean\nname: {}\nmodels: [{{model: {}, parameters: {{weight: 1}}}}]"
    for name, model in [("no", "on"), ("12:30", "007"), ("2024-01-02", "1e5"), ("true", "0x1f")]:
        plan = good(text.format(name, model)).accepted()
        assert (plan.name, plan.models[0].model.path) == (name, model)


@pytest.mark.parametrize(
    ("word", "value"), [("no", False), ("yes", True), ("on", True), (0, False)]
)
def test_a_flag_takes_yes_and_no(word: object, value: bool) -> None:
    text = "merge_method: deltas\nbase_model: b\nmodels: [{model: a}]\n"
    reading = good(text + f"parameters: {{weight: 1, normalize: {word}}}")
    assert reading.lookup is not None
    assert reading.lookup.resolve("w", PLACE)["normalize"] is value


def test_quoted_numbers_are_numbers_as_in_mergekit() -> None:
    reading = good("merge_method: mean\nmodels: [{model: a, parameters: {weight: '1e-5'}}]")
    assert reading.lookup is not None
    assert reading.lookup.resolve("w", PLACE)["weight"] == (1e-5,)


def test_a_duplicate_key_is_a_fault_at_its_second_place() -> None:
    assert faults(MEAN + "models: []\n") == [
        "plan:4:1: key 'models' is given twice (first on line 2); keep one"
    ]


def test_anchors_and_merge_keys_work() -> None:
    plan = good(
        "merge_method: mean\n"
        "models:\n"
        "  - model: a\n"
        "    parameters: &p {weight: 1, steps: 2}\n"
        "  - model: b\n"
        "    parameters: {<<: *p, weight: 3}\n".replace(", steps: 2", "")
    ).accepted()
    assert plan.models[1].parameters == {"weight": 3}


def test_a_fault_inside_an_alias_is_placed_where_the_text_stands() -> None:
    text = MEAN.replace("{weight: 1}", "&p {wieght: 1}") + "  - {model: b, parameters: *p}\n"
    told = [fault for fault in faults(text) if "wieght" in fault]
    assert len(told) == 1  # the same words are one fault
    assert told[0].startswith("plan:3:32: unknown key 'wieght' under parameters")


def test_an_alias_bomb_is_stopped() -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert any(
        "aliases expand to more than 100,000 nodes" in told for told in faults("\n".join(rows))
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("models: &a [*a]\n", "nested too deeply, or an anchor that holds itself"),
        ("a: &a\n  <<: *a\n", "nested too deeply, or an anchor that holds itself"),
        ("[" * 5000 + "\n", "plan: nested too deeply to be a plan"),
        ("merge_method: mean\n\tmodels: []\n", "plan:2:1: a tab cannot indent YAML; use spaces"),
        ("merge_method: a: b\n", "plan:1:16: no ': ' is expected here"),
        ("models: [a\nb: c\n", "plan:2:2: not YAML"),
        ("models: *x\n", "plan:1:9: not YAML: found undefined alias 'x'"),
        ("name: !!python/object:os.system x\n", "plan:1:7: the tag"),
        ("name: a\x00b\n", "may not stand in YAML"),
        ("\n", "the plan is empty; it needs merge_method and models"),
        ("# only words\n", "the plan is empty"),
        ("- a\n- b\n", "plan:1:1: a plan is a mapping of keys to values; got a list"),
        ("? [a]\n: b\n", "plan:1:3: a key must be a word"),
        (MEAN + "---\n" + MEAN, "plan:5:1: a second document without `name:`"),
    ],
)
def test_texts_that_are_no_plan_say_why_and_where(text: str, told: str) -> None:
    assert any(told in fault for fault in faults(text)), faults(text)


def test_one_document_between_marks_is_fine() -> None:
    good("---\n" + MEAN + "---\n")


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"\xff\xfe\x00", "not UTF-8 text (byte 0)"), (None, "cannot be read: No such file")],
)
def test_unreadable_files_are_faults(tmp_path: Path, content: bytes | None, told: str) -> None:
    file = tmp_path / "plan.yml"
    if content is not None:
        file.write_bytes(content)
    assert [told in fault and str(file) in fault for fault in faults(file)] == [True]
    assert read(file).plan is None


def test_a_byte_order_mark_is_not_part_of_the_first_key(tmp_path: Path) -> None:
    file = tmp_path / "plan.yml"
    file.write_bytes(b"\xef\xbb\xbf" + MEAN.encode())
    good(file)


# ---- keys


def test_an_empty_mapping_misses_both_keys() -> None:
    told = faults("{}")
    assert told[0].startswith("plan:1:1: missing key 'merge_method'")
    assert told[1].startswith("plan:1:1: missing key 'models'")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "base_modle: b",
            "4:1: unknown key 'base_modle'; did you mean 'base_model'? (valid: merge_",
        ),
        ("normalize: false", "4:1: unknown key 'normalize': it is a parameter and belongs under"),
        ("seed: 2", "4:1: unknown key 'seed': a method that draws at random takes it"),
        ("steps: 2", "4:1: unknown key 'steps': it is a parameter and belongs under `parameters:`"),
        ("slices: []", "4:1: 'slices' is empty, without effect; remove it"),
        ("text: x", "4:1: unknown key 'text'"),
        ("dtype: bf16", "4:8: 'bf16' is not a dtype of merged weights; did you mean 'bfloat16'?"),
        ("out_dtype: half", "did you mean 'float16'? (valid: float32, float16, bfloat16, float64)"),
        ("dtype: int8", "4:8: 'int8' is not a dtype of merged weights"),
        ("name: [a]", "4:7: name must be text; got a list"),
        ("parameters: 3", "4:13: parameters is a mapping of names to values"),
        ("then: {lift: {}}", "4:7: then is a list of operators"),
        ("base_model: [b]", "4:13: a model is a path, or PATH@REVISION"),
        ("base_model: b+c+d", "4:13: 'b+c+d' can be cut at more than one '+'; write the adapter"),
        ("base_model: b@v@w", "4:13: 'b@v@w' is not PATH or PATH@REVISION"),
        ("base_model: b@", "4:13: 'b@' is not PATH or PATH@REVISION"),
        ("base_model: {model: b, lora: [c]}", "4:24: an adapter is PATH, PATH@REVISION or"),
        (
            "base_model: {path: b, revison: c}",
            "4:23: unknown key 'revison' in a model; did you mea",
        ),
        (
            "base_model: {revision: c}",
            "4:13: a model is PATH@REVISION, {path, revision} or {model}",
        ),
    ],
)
def test_a_faulty_line_is_told_with_its_place_and_the_way_out(line: str, told: str) -> None:
    found = [fault for fault in faults(MEAN + line + "\n") if "missing required" not in fault]
    assert len(found) == 1
    assert told in found[0]


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("./a", "3:5: a model is written `- model: PATH`; got './a'"),
        (
            "{model: a, weight: 1}",
            "3:16: unknown key 'weight': it is a parameter and belongs under",
        ),
        (
            "{model: a, layer_range: [0, 1]}",
            "3:16: 'layer_range' has no effect under models",
        ),
        (
            "{modle: a}",
            "3:6: unknown key 'modle'; did you mean 'model'? "
            "(valid: model, adapter, delta, parameters, prefix)",
        ),
        ("{parameters: {}}", "3:5: missing key 'model': write `- model: PATH`"),
        ("{model: [a]}", "3:13: a model is a path, or PATH@REVISION"),
        ("{model: a, parameters: [1]}", "3:28: parameters is a mapping of names to values"),
    ],
)
def test_a_faulty_entry_is_one_fault(entry: str, told: str) -> None:
    text = f"merge_method: deltas\nmodels:\n  - {entry}\nbase_model: b\nparameters: {{weight: 1}}\n"
    (found,) = faults(text)
    assert told in found


def test_a_list_of_models_as_a_mapping_is_told_how_to_write_it() -> None:
    (told,) = faults("merge_method: mean\nmodels: {a: 1}\n")
    assert told == "plan:2:9: models is a list: write `- model: PATH` for each"


def test_every_fault_of_a_plan_is_in_one_report_in_the_order_of_the_text() -> None:
    reading = read(
        "merge_method: deltas\n"
        "dtype: bf16\n"
        "models:\n"
        "  - ./plain\n"
        "  - model: a\n"
        "    parameters: {wieght: 1, weight: x}\n"
        "  - model: b\n"
        "    parameters: {weight: 1, density: 1.5}\n"
        "    parameters: {}\n"
        "parameters:\n"
        "  lamda: 1\n"
        "then:\n"
        "  - lift: {beta: x}\n"
        "  - lfit\n"
        "foo: 1\n"
    )
    places = [(fault.line, fault.column) for fault in reading.faults]
    assert places == sorted(places)
    assert [line for line, _ in places] == [1, 2, 4, 6, 6, 8, 9, 11, 12, 13, 14, 15]
    with pytest.raises(PlanError) as raised:
        reading.accepted()
    assert raised.value.faults == reading.faults


def test_what_is_left_of_a_faulty_plan_can_still_be_opened() -> None:
    reading = read("merge_method: nothing\ndtype: bf16\nmodels:\n  - 3\n  - {model: a}\n")
    assert reading.plan is not None
    assert [str(entry.model) for entry in reading.plan.models] == ["a"]
    assert reading.lookup is None


def test_the_place_of_a_later_entry_holds_when_an_earlier_one_is_set_aside() -> None:
    reading = read("merge_method: mean\nmodels:\n  - 3\n  - {model: a, parameters: {weight: 1}}\n")
    assert reading.fault(("models", 0, "model"), "no such folder").line == 4
    assert str(reading.fault(("models", 0, "model"), "x", kind="source")) == "plan:4:13: x"


def test_a_mapping_without_text_names_the_keys_instead_of_lines() -> None:
    entries = [3, {"model": "a", "parameters": {"weight": "x"}}]
    told = faults({"merge_method": "mean", "models": entries})
    assert told == [
        "plan: models[0]: a model is written `- model: PATH`; got 3",
        "plan: models[1].parameters.weight: weight must be a number; got 'x'",
    ]


# ---- models


def test_a_folder_that_exists_is_used_as_it_is_even_with_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b@c").mkdir()
    model = ModelReference.model_validate("a+b@c")
    assert (model.path, model.revision, model.local) == ("a+b@c", None, Path("a+b@c"))


def test_a_revision_of_a_local_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    found = faults(MEAN + "  - {model: base@main, parameters: {weight: 1}}\n")
    assert found == ["plan:4:13: 'base' is local, where a revision has no effect; drop '@main'"]


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert ModelReference.model_validate("~/m").path == "/somewhere/m"
    assert ModelReference.model_validate({"path": "~/m"}).path == "/somewhere/m"


@pytest.mark.parametrize(
    "raw",
    [
        "org/m@v1",
        {"path": "org/m", "revision": "v1"},
        {"model": "org/m@v1"},
        {"model": {"path": "org/m", "revision": "v1"}, "lora": None},
    ],
)
def test_every_spelling_of_a_model_means_the_same(raw: Any) -> None:
    assert ModelReference.model_validate(raw) == ModelReference(path="org/m", revision="v1")


def test_an_architecture_is_read_as_text_and_makes_no_other_model() -> None:
    words = {
        "model": {"path": "org/m", "revision": "v1"},
        "override_architecture": "LlamaForCausalLM",
    }
    model = ModelReference.model_validate(words)
    assert model.override_architecture == "LlamaForCausalLM"
    assert model.key == ModelReference(path="org/m", revision="v1").key
    text = "merge_method: mean\nmodels:\n  - model: {model: a, override_architecture: [x]}\n"
    reading = read(text + "    parameters: {weight: 1}\n")
    assert [str(fault) for fault in reading.faults] == [
        "plan:3:23: override_architecture must be text"
    ]


def test_a_windows_drive_is_part_of_a_path() -> None:
    assert ModelReference.model_validate("C:\\models\\m").path == "C:\\models\\m"


def test_a_revision_of_digits_keeps_its_spelling() -> None:
    text = "merge_method: mean\nmodels:\n  - model: {path: a, revision: 0012e3}\n"
    plan = good(text + "    parameters: {weight: 1}\n").accepted()
    assert plan.models[0].model.revision == "0012e3"


def test_a_model_listed_twice_is_refused_however_it_is_spelt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    found = faults(MEAN + "  - {model: ./a/, parameters: {weight: 1}}\n")
    assert found == ["plan:4:13: model ./a/ is listed twice (first on line 3); keep one"]


# ---- the method and its models


def test_an_unknown_method_is_told_at_its_place() -> None:
    told = faults(MEAN.replace("mean", "meen"))
    assert told == ["plan:1:15: unknown method 'meen'; did you mean 'mean'?"]


def test_a_base_that_is_needed_is_asked_for() -> None:
    (told,) = faults("merge_method: pair\nmodels: [{model: a}]\nparameters: {t: 0.5}\n")
    assert told.startswith("plan:1:15: pair needs `base_model:`")


def test_models_are_counted_without_the_base() -> None:
    head = "merge_method: pair\nparameters: {t: 0.5}\nbase_model: b\n"
    good(head + "models: [{model: b}, {model: a}]\n")
    (told,) = faults(head + "models: [{model: a}, {model: c}]\n")
    assert told == "plan:4:1: pair takes 1 model besides base_model; the plan gives 2"


def test_an_unlisted_base_joins_the_models_where_the_method_has_no_base() -> None:
    reading = good(MEAN.replace("models", "parameters: {weight: 2}\nmodels") + "base_model: b\n")
    assert reading.lookup is not None
    assert [str(model) for model in reading.lookup.members()] == ["a", "b"]
    assert reading.lookup.resolve("w", PLACE)["weight"] == (1.0, 2.0)
    (told,) = faults(MEAN + "base_model: b\n")
    assert told.startswith(
        "plan:4:13: missing required parameter 'weight' for b; a base_model that"
    )


def test_then_needs_a_base_and_a_method_that_works_on_deltas() -> None:
    told = faults(MEAN + "then:\n  - lift\n  - pair\n")
    assert told == [
        "plan:4:1: then works on the delta to a base: it needs `base_model:`",
        "plan:6:5: 'pair' cannot stand under then: it makes a delta (these can: lift)",
    ]


@pytest.mark.parametrize("item", ["[lift]", "{lift: {}, pair: {}}", "{}", "3"])
def test_a_step_is_one_method(item: str) -> None:
    text = MEAN.replace("models", "base_model: a\nmodels")
    (told,) = faults(text + f"then:\n  - {item}\n")
    assert told.startswith("plan:6:5: each item under then is one method")


# ---- the schema


def test_the_schema_names_every_method_and_its_parameters() -> None:
    found = schema()
    json.dumps(found)
    names = [choice["const"] for choice in found["properties"]["merge_method"]["oneOf"]]
    assert names == ["deltas", "lift", "mean", "pair"]
    own = found["definitions"]["deltas.model"]["properties"]
    assert set(own) == {"weight", "density"}
    density = own["density"]
    assert density["default"] == 1.0
    assert density["anyOf"][0] == {"exclusiveMinimum": 0, "maximum": 1, "type": "number"}
    assert set(found["definitions"]["deltas.shared"]["properties"]) > {"lambda", "scope"}
    scope = found["definitions"]["deltas.shared"]["properties"]["scope"]
    assert (scope["enum"], scope["default"]) == (["tensor", "model"], "tensor")


def test_the_schema_asks_for_a_base_only_where_the_method_does() -> None:
    needs = {
        choice["if"]["properties"]["merge_method"]["const"]: choice["then"].get("then")
        for choice in schema()["allOf"]
    }
    assert needs["deltas"] == {"required": ["base_model"]}  # where whole models merge
    assert needs["mean"] is None


def test_only_adjustments_stand_under_then_in_the_schema() -> None:
    names, lift = schema()["properties"]["then"]["items"]["anyOf"]
    assert names == {"enum": ["lift"]}
    assert list(lift["properties"]) == ["lift"]
