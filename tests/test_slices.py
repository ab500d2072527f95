"""Stacks: output layers that are slices of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekit_ft
from mergekit_ft.resolution.depths import depths
from tests.checkpoints import write_checkpoint
from tests.small_models import CONFIG, cli, merged, no_reading, refused, tensors, weights

HEAD = "merge_method: linear\n"


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a (3 layers, two files), b (3 layers) and tall (5 layers)."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("a"), weights(1), config=CONFIG, shards=2)
    write_checkpoint(Path("b"), weights(2), config=CONFIG)
    write_checkpoint(Path("tall"), weights(3, layers=5), config={**CONFIG, "num_hidden_layers": 5})


def source(model: str, first: int, end: int, more: str = "") -> str:
    return f"{{model: ./{model}, layer_range: [{first}, {end}]{more}}}"


def slices(*parts: str, more: str = "") -> str:
    """Return a linear plan; each part is the sources of one slice."""
    listed = "".join(f"  - sources: [{part}]\n" for part in parts)
    return f"{HEAD}slices:\n{listed}parameters: {{weight: 1}}\n{more}"


def layer(found: dict[str, Tensor], number: int) -> list[Tensor]:
    inside = sorted(name for name in found if f"layers.{number}." in name)
    return [found[name] for name in inside]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- what comes out


def test_layers_come_from_where_the_slices_say_and_repeat() -> None:
    merged(slices(source("a", 0, 2), source("tall", 3, 5), source("a", 1, 3)))
    out, a, tall = tensors(), tensors("a"), tensors("tall")
    origins = [(a, 0), (a, 1), (tall, 3), (tall, 4), (a, 1), (a, 2)]
    for number, (model, taken) in enumerate(origins):
        assert same(layer(out, number), layer(model, taken)), number
    assert not layer(out, 6)
    assert torch.equal(out["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(out["model.norm.weight"], a["model.norm.weight"])


def test_what_is_before_the_layers_is_of_the_first_slice_and_what_is_after_of_the_last() -> None:
    merged(slices(source("b", 0, 1), source("a", 0, 1), source("tall", 0, 1)))
    out = tensors()
    assert torch.equal(out["model.embed_tokens.weight"], tensors("b")["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(out[name], tensors("tall")[name])


def test_gradients_start_anew_in_every_slice() -> None:
    # three layers: t = 0, 1/2, 1, so the weight of b is 0, 1, 2 beside 1 for a: 0, 1/2, 2/3
    part = f"{source('a', 0, 3)}, {source('b', 0, 3, ', parameters: {weight: [0, 2]}')}"
    merged(slices(part, part))
    out, a, b = tensors(), tensors("a"), tensors("b")
    for number in range(6):
        share = (0, 1 / 2, 2 / 3)[number % 3]
        pairs = zip(layer(out, number), layer(a, number % 3), layer(b, number % 3), strict=True)
        for got, one, other in pairs:
            assert torch.allclose(got, one + share * (other - one), atol=1e-6)


def test_the_nearest_level_decides() -> None:
    text = f"""
merge_method: linear
parameters: {{weight: 1, normalize: false}}
slices:
  - sources: [{source("a", 0, 1)}]
  - sources: [{source("a", 1, 2)}]
    parameters: {{weight: 2}}
  - sources: [{source("a", 2, 3, ", parameters: {weight: 3}")}]
    parameters: {{weight: [{{filter: nothing_here, value: 9}}, {{value: 4}}]}}
"""
    result = cli("merge", "-", "out", text=text)
    assert result.exit_code == 3 and "filter 'nothing_here' matches no tensor" in result.stderr
    idle = "    parameters: {weight: [{filter: nothing_here, value: 9}, {value: 4}]}\n"
    merged(text.replace(idle, ""))
    for number in range(3):
        got, own = layer(tensors(), number), layer(tensors("a"), number)
        assert same(got, [(number + 1) * tensor for tensor in own])


def test_a_base_that_is_not_listed_takes_the_layers_that_all_others_take() -> None:
    text = (
        "merge_method: task_arithmetic\nbase_model: ./a\nparameters: {weight: 0.5}\nslices:\n"
        f"  - sources: [{source('b', 1, 3)}]\n  - sources: [{source('b', 0, 1)}]\n"
    )
    merged(text)
    for number, taken in enumerate((1, 2, 0)):
        pairs = zip(
            layer(tensors(), number),
            layer(tensors("a"), taken),
            layer(tensors("b"), taken),
            strict=True,
        )
        for got, base, tuned in pairs:
            assert torch.allclose(got, base + 0.5 * (tuned - base), atol=1e-6)
    unlike = text.replace("[1, 3]}]", "[1, 3]}, {model: ./tall, layer_range: [0, 2]}]")
    refused(3, "./a is not among these sources, which take unlike layers", unlike, "other")


def test_config_and_files_fit_the_stack() -> None:
    result = merged(slices(source("a", 0, 3), source("a", 0, 3)))
    before, after = (Path(folder, "config.json").read_text() for folder in ("a", "out"))
    assert after == before.replace('"num_hidden_layers": 3', '"num_hidden_layers": 6')
    assert [path.name for path in sorted(Path("out").glob("*.safetensors*"))] == [
        "model.safetensors"
    ]
    assert "nothing changed" not in result.output


def test_a_stack_of_several_shards_has_an_index_of_every_tensor() -> None:
    merged(slices(source("a", 0, 3), source("b", 0, 3)), "out", "--max-shard-size", "2KB")
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors().keys()
    assert {Path("out", name).exists() for name in index["weight_map"].values()} == {True}


def test_a_stack_verifies_and_a_changed_byte_does_not() -> None:
    part = f"{source('a', 0, 2)}, {source('b', 1, 3)}"
    merged(slices(part, source("tall", 1, 4)))
    assert cli("verify", "out", "--full").exit_code == 0
    file = Path("out/model.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 64
    file.write_bytes(raw)
    assert cli("verify", "out", "--full").exit_code != 0


def test_masks_in_a_stack_are_the_same_when_verified() -> None:
    text = (
        "merge_method: dare_linear\nbase_model: ./a\nparameters: {weight: 0.5, density: 0.5}\n"
        f"slices:\n  - sources: [{source('a', 0, 2)}, {source('b', 0, 2)}]\n"
        f"  - sources: [{source('a', 0, 3)}, {source('tall', 2, 5)}]\n"
    )
    merged(text)
    assert cli("verify", "out", "--full").exit_code == 0


def test_a_stack_can_be_a_stage() -> None:
    stage = f"name: stack\n{slices(source('a', 0, 3), source('b', 2, 3))}"
    last = (
        "---\nmerge_method: linear\nmodels: [{model: stack, parameters: {weight: 1}}, "
        "{model: ./four, parameters: {weight: 1}}]\n"
    )
    write_checkpoint(Path("four"), weights(7, layers=4), config={**CONFIG, "num_hidden_layers": 4})
    merged(stage + last)
    got, one, four = layer(tensors(), 3), layer(tensors("b"), 2), layer(tensors("four"), 3)
    pairs = zip(got, one, four, strict=True)
    assert all(torch.allclose(a, (b + c) / 2, atol=1e-6) for a, b, c in pairs)
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == 4


# ---- what is told


def test_check_draws_the_stack_and_says_what_comes_twice() -> None:
    text = slices(source("a", 0, 3), f"{source('b', 1, 3)}, {source('a', 1, 3)}", source("b", 2, 3))
    drawn = cli("check", "-", text=text).output
    assert "  out 0-2 <- ./a 0-2\n" in drawn
    assert "  out 3-4 <- ./b 1-2 + ./a 1-2 (1-2 again)\n" in drawn
    assert "  out 5 <- ./b 2 (2 again)\n" in drawn
    assert "note: ./b: layer 0 of model.layers in no slice" in drawn
    assert drawn.count("note: ./a: ") == 1  # its norm and head
    report = json.loads(cli("check", "-", "--json", text=text).output)
    assert report["slices"][1] == {
        "stack": "model.layers",
        "layers": [3, 5],
        "sources": [
            {"model": "./b", "layers": [1, 3], "base": False, "again": []},
            {
                "model": "./a",
                "layers": [1, 3],
                "base": False,
                "again": [{"layer": 1, "first": 1}, {"layer": 2, "first": 2}],
            },
        ],
    }
    assert report["tensors"]["unused"] == {}


def test_layers_in_no_slice_are_no_conflict() -> None:
    text = slices(source("a", 0, 2), source("tall", 4, 5))
    assert cli("check", "-", "--strict", text=text).exit_code == 0


# ---- what is refused, before a weight is read


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ("{model: ./a, layer_range: [1, 1]}", "3:41: layer_range [1, 1] is empty; layer 1 is"),
        ("{model: ./a, layer_range: [0, -1]}", "3:41: layer_range [0, -1] is negative"),
        ("{model: ./a, layer_range: [3, 1]}", "3:41: layer_range [3, 1] runs backwards; write"),
        (
            "{model: ./a, layer_range: [1, 9]}",
            "3:41: layer_range [1, 9] reaches past the end of ./a, which has 3 layers "
            "(model.layers 0..2); the last is in [1, 3]",
        ),
        ("{model: ./a, layer_range: [7, 9]}", "3:41: layer_range [7, 9] reaches past the end"),
        ("{model: ./a, layer_range: 3}", "3:41: layer_range is [first, end], the end not"),
        ("{model: ./a, layer_range: [0, 1, 2]}", "the end not included; got [0, 1, 2]"),
        ("{model: ./a, layer_range: [0, 1.5]}", "3:41: layer_range is [first, end], the end not"),
        ("{model: ./a, layer_range: [0, true]}", "3:41: layer_range is [first, end], the end not"),
        ("{model: ./a}", "3:15: missing key 'layer_range': write `layer_range: [0, 8]`"),
        ("{layer_range: [0, 1]}", "3:15: missing key 'model'"),
        ("", "3:5: an output slice without sources has no layers"),
        (
            "{model: ./a, layer_range: [0, 1]}, {model: ./b, layer_range: [0, 2]}",
            "3:76: layer_range of ./b takes 2 layers, that of ./a 1 (line 3); the sources",
        ),
        (
            "{model: ./a, layer_range: [0, 1]}, {model: ./a, layer_range: [1, 2]}",
            "3:58: model ./a is listed twice",
        ),
        (
            "{model: ./a, layer_range: [0, 1], wieght: 1}",
            "3:49: unknown key 'wieght'",
        ),
        (
            "{model: ./a, layer_range: [0, 1], parameters: {normalize: true}}",
            "3:62: 'normalize' is one value for all models, without effect under one; move it to "
            "the slice's `parameters:`",
        ),
    ],
)
def test_a_slice_that_cannot_be_is_one_line_before_a_weight_is_read(
    sources: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_reading(monkeypatch)
    refused(3 if "past the end" not in said else 4, said, slices(sources))


def test_residual_weight_is_refused_with_the_remark_that_it_never_had_an_effect() -> None:
    text = slices(source("a", 0, 1)).replace("  - sources", "  - residual_weight: 0.5\n    sources")
    refused(3, "3:5: 'residual_weight' never had an effect in mergekit", text)
    merged(text, "out", "--lenient")


def test_a_plan_lists_models_or_slices_not_both() -> None:
    text = slices(source("a", 0, 1)) + "models: [{model: ./a}]\n"
    refused(3, "a plan has one of models, slices and modules", text)


def test_layers_of_another_kind_do_not_merge() -> None:
    other = weights(5) | {"model.layers.1.mlp.up_proj.weight": torch.ones(4, 8)}
    del other["model.layers.2.input_layernorm.weight"]
    write_checkpoint(Path("other"), other, config=CONFIG)
    text = slices(f"{source('a', 0, 3)}, {source('other', 0, 3)}")
    result = cli("check", "-", text=text)
    assert result.exit_code == 4
    assert "./other lacks 1 tensor (model.layers.2.input_layernorm.weight)" in result.stderr
    assert "model.layers.1.mlp.up_proj.weight has shape [4, 8], not [16, 8]" in result.stderr


def test_a_survey_over_the_whole_model_needs_the_same_models_in_every_slice() -> None:
    text = (
        "merge_method: ties\nbase_model: ./a\n"
        "parameters: {weight: 1, density: 0.5, scope: model}\nslices:\n"
        f"  - sources: [{source('a', 0, 2)}, {source('b', 0, 2)}]\n"
        f"  - sources: [{source('a', 0, 2)}, {source('tall', 0, 2)}]\n"
    )
    refused(3, "ties ranks the whole model at once, so every slice must merge the same", text)
    merged(text.replace("tall", "b"))
    merge_b = text.replace("tall", "b")
    inner = merge_b.replace("}]\n  -", "}]\n    parameters: {scope: tensor}\n  -")
    refused(3, "'scope' has one value for the whole plan", inner, "inner")


# ---- what a config says of its layers

FOUR: dict[str, Any] = {"num_hidden_layers": 4, "architectures": ["X"]}


def said_of(config: dict[str, Any], numbers: list[int]) -> dict[str, Any]:
    found = depths(config, 4, [(config, number, 4) for number in numbers], ())
    assert not found.faults and not found.notes
    return found.edits


def test_lists_by_layer_follow_the_layers() -> None:
    config = {
        **FOUR,
        "layer_types": ["full", "sliding", "full", "linear"],
        "no_rope_layers": [1, 1, 0, 1],
        "mlp_only_layers": [0, 3],
        "eos_token_id": [1, 2, 3, 4],
        "mrope_section": [4, 4, 8, 8],
    }
    assert said_of(config, [0, 3, 3, 2, 1]) == {
        "num_hidden_layers": 5,
        "layer_types": ["full", "linear", "linear", "full", "sliding"],
        "no_rope_layers": [1, 1, 1, 0, 1],
        "mlp_only_layers": [0, 1, 2],
    }


def test_a_part_of_a_config_is_found_by_what_counts_its_layers() -> None:
    config = {"text_config": {"n_layer": 4, "layer_types": list("abcd")}, "vision_config": {}}
    assert said_of(config, [3, 3]) == {
        "text_config.n_layer": 2,
        "text_config.layer_types": ["d", "d"],
    }


def test_a_stack_in_its_own_order_changes_nothing() -> None:
    assert said_of({**FOUR, "layer_types": list("abcd")}, [0, 1, 2, 3]) == {}


def test_each_layer_brings_its_own_models_word() -> None:
    one, other = {**FOUR, "layer_types": list("abcd")}, {**FOUR, "layer_types": list("wxyz")}
    found = depths(one, 4, [(one, 0, 4), (other, 3, 4)], ())
    assert found.edits["layer_types"] == ["a", "z"]


def test_leading_layers_of_another_kind_are_counted_anew_or_refused() -> None:
    config = {**FOUR, "first_k_dense_replace": 1}
    assert said_of(config, [0, 0, 1, 2, 3])["first_k_dense_replace"] == 2
    found = depths(config, 4, [(config, n, 4) for n in (1, 0, 2)], ())
    assert "first_k_dense_replace: 1 takes output layers 0, 1 for another kind" in found.faults[0]


def test_periods_that_no_longer_hold_are_told_or_refused() -> None:
    config = {**FOUR, "sliding_window_pattern": 2}
    assert said_of(config, [0, 1, 2, 3, 0, 1]) == {"num_hidden_layers": 6}
    found = depths(config, 4, [(config, n, 4) for n in (0, 1, 1)], ())
    assert "sliding_window_pattern: 2 takes output layers 2" in found.notes[0]
    mixed = {**FOUR, "decoder_sparse_step": 2}
    assert depths(mixed, 4, [(mixed, n, 4) for n in (0, 1, 1)], ()).faults


def test_a_config_that_counts_no_layers_is_refused_where_their_number_changes() -> None:
    write_checkpoint(Path("odd"), weights(1), config={"model_type": "odd"})
    refused(4, "no key of its config.json", slices(source("odd", 0, 3), source("odd", 0, 3)))
    merged(slices(source("odd", 0, 3)), "out", "--allow-unchanged")


def test_load_gives_the_model_of_the_stack() -> None:
    from tests.checkpoints import tiny_qwen2

    tiny_qwen2(Path("q"), layers=2)
    model = mergekit_ft.load(slices(source("q", 0, 2), source("q", 0, 2)))
    assert model.config.num_hidden_layers == 4 and len(model.config.layer_types) == 4
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ---- layers of unlike kinds


def test_a_layer_with_more_tensors_than_the_first_sources_is_refused() -> None:
    more = weights(4) | {"model.layers.1.mlp.extra.weight": torch.ones(2, 2)}
    write_checkpoint(Path("more"), more, config=CONFIG)
    text = slices(f"{source('a', 0, 3)}, {source('more', 0, 3)}")
    refused(4, "layer 1 of ./more has 1 tensor (model.layers.0.mlp.extra.weight) that", text)


def test_a_kind_of_layer_out_of_its_place_is_refused_unless_the_config_tells_kinds_apart() -> None:
    first = weights(4) | {"model.layers.0.attn.relative.weight": torch.ones(2, 2)}
    write_checkpoint(Path("first"), first, config=CONFIG)
    merged(slices(source("first", 0, 2), source("first", 1, 3)))
    said = "output layer 2 would have other tensors than layer 2 of ./first"
    refused(4, said, slices(source("first", 0, 2), source("first", 0, 2)), "other")
    typed = {**CONFIG, "layer_types": ["relative", "plain", "plain"]}
    write_checkpoint(Path("typed"), first, config=typed)
    merged(slices(source("typed", 0, 2), source("typed", 0, 2)), "typed_out")
    config = json.loads(Path("typed_out/config.json").read_text())
    assert config["layer_types"] == ["relative", "plain", "relative", "plain"]


def test_constants_in_layers_that_only_some_checkpoints_hold_are_copied() -> None:
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    old = weights(4) | {name.format(i): torch.full((4,), float(i)) for i in range(3)}
    write_checkpoint(Path("old"), old, config=CONFIG)
    merged(slices(f"{source('old', 1, 3)}, {source('a', 0, 2)}"))
    assert torch.equal(tensors()[name.format(0)], torch.ones(4))


# ---- several stacks


@pytest.fixture
def t5() -> None:
    from tests.checkpoints import tiny_t5

    for seed, name in enumerate(("t", "u")):
        tiny_t5(Path(name), seed=seed, layers=3)


ENCODER = """merge_method: linear
parameters: {weight: 1}
modules:
  encoder:
    slices:
      - sources: [{model: ./t, layer_range: [0, 2]}]
      - sources: [{model: ./u, layer_range: [1, 3]}]
  decoder: {models: [{model: ./t}, {model: ./u}], parameters: {weight: 3}}
  shared: {models: [{model: ./u}]}
"""


@pytest.mark.usefixtures("t5")
def test_each_stack_of_a_model_is_sliced_by_the_name_of_its_module() -> None:
    import transformers

    merged(ENCODER)
    out, t, u = tensors(), tensors("t"), tensors("u")
    assert same(inside(out, "encoder.block.3."), inside(u, "encoder.block.2."))
    assert same(inside(out, "encoder.block.1."), inside(t, "encoder.block.1."))
    assert torch.equal(out["shared.weight"], u["shared.weight"])
    norm = "final_layer_norm.weight"
    assert torch.equal(out[f"encoder.{norm}"], u[f"encoder.{norm}"])
    for got, one, other in zip(*(inside(m, "decoder.block.2.") for m in (out, t, u)), strict=True):
        assert torch.allclose(got, (one + other) / 2, atol=1e-6)
    config = json.loads(Path("out/config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (4, 3)
    _, told = transformers.AutoModelForSeq2SeqLM.from_pretrained("out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert cli("verify", "out", "--full").exit_code == 0


def inside(found: dict[str, Tensor], prefix: str) -> list[Tensor]:
    return [found[name] for name in sorted(found) if name.startswith(prefix)]


@pytest.mark.usefixtures("t5")
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  shared:", "  sharde:", "9:3: ./t has no module 'sharde'; did you mean 'shared'?"),
        ("  shared: {models: [{model: ./u}]}\n", "", "3:1: modules leaves out shared, which"),
        ("{models: [{model: ./u}]}", "{}", "9:3: module 'shared' has neither models nor slices"),
        ("  encoder:", "  encoder.block:\n    models: [{model: ./t}]\n  encoder:", "by another"),
    ],
)
def test_modules_that_are_not_the_models_are_refused(old: str, new: str, said: str) -> None:
    result = cli("check", "-", text=ENCODER.replace(old, new))
    assert result.exit_code in (3, 4)
    assert said in result.stderr


@pytest.mark.usefixtures("t5")
def test_slices_of_a_model_with_several_stacks_name_modules() -> None:
    said = "2:1: ./t has several stacks of layers (decoder, encoder, shared); slice each under"
    refused(3, said, slices(source("t", 0, 1)))


def test_the_module_of_a_model_with_one_stack_is_default() -> None:
    text = f"{HEAD}parameters: {{weight: 1}}\nmodules: {{default: {{slices: [{{sources: ["
    merged(f"{text}{source('a', 1, 3)}]}}]}}}}\n")
    assert same(layer(tensors(), 0), layer(tensors("a"), 1))
    models = "modules: {default: {models: [{model: ./a}, {model: ./b}], parameters: {weight: 2}}}"
    merged(f"{HEAD}{models}\n", "both")
    pairs = zip(*(layer(tensors(m), 2) for m in ("both", "a", "b")), strict=True)
    assert all(torch.allclose(got, (one + two) / 2, atol=1e-6) for got, one, two in pairs)
    refused(4, "./tall has 5 layers, ./a 3", f"{HEAD}{models}\n".replace("/b", "/tall"), "no")


def test_migrate_says_where_the_end_of_a_stack_is_another() -> None:
    text = slices(source("a", 0, 1), f"{source('a', 1, 3)}, {source('b', 1, 3)}")
    result = cli("migrate", "-", text=text)
    assert "take every source of the last slice" in result.output
