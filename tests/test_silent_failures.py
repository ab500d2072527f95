"""Each way in which a merge was seen to lie, refused or told: plans, sources, values."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_ft.writer import Writer
from tests.checkpoints import write_checkpoint
from tests.small_models import (
    CONFIG,
    arithmetic,
    cli,
    merged,
    no_reading,
    refused,
    same_bytes,
    tensors,
    three,
    weights,
)
from tests.small_models import (
    models as models,
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (arithmetic(more="modles: oops\n"), "unknown key 'modles'; did you mean 'models'?"),
        (arithmetic(more="normalize: false\n"), "it is a parameter and belongs under"),
        (arithmetic().replace("{model: ./maths,", "{model: ./maths, wait: 2,"), "unknown key"),
        (
            arithmetic(more="parameters: {normalise: false}\n"),
            "unknown key 'normalise' under parameters; did you mean 'normalize'?",
        ),
        (
            arithmetic(more="then:\n  - lines: {beta: 0.5, alpa: 1}\n"),
            "unknown key 'alpa' under lines; did you mean 'alpha'?",
        ),
        (arithmetic(weight="{vale: 1}"), "vale"),
    ],
    ids=["root", "normalize at the root", "model", "parameters", "then", "value"],
)
def test_an_unknown_key_is_refused_at_every_level(
    text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_reading(monkeypatch)
    refused_with_others(3, said, text)


def refused_with_others(code: int, said: str, text: str) -> None:
    """Merge; the report may hold more faults that follow from the first."""
    result = cli("merge", "-", "out", text=text)
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert not Path("out").exists() and not Path("out.part").exists()


def test_a_misspelt_parameter_is_refused_and_not_taken_for_its_default() -> None:
    text = arithmetic().replace("weight", "wieght")
    refused_with_others(3, "unknown key 'wieght' under parameters; did you mean 'weight'?", text)


@pytest.mark.parametrize("key", ["filter: self_atn", "match: '*.self_atn.*'", "layers: 7..9"])
def test_a_selector_that_matches_nothing_is_refused(key: str) -> None:
    text = arithmetic(weight=f"[{{value: 0.9, {key}}}, {{value: 0.5}}]")
    refused(3, "matches no", text)


def test_a_selector_that_an_earlier_one_shadows_is_refused() -> None:
    text = arithmetic(weight="[{value: 0.1}, {value: 1, filter: mlp}]")
    refused(3, "this entry never decides", text)


def test_a_parameter_for_all_models_is_refused_under_one() -> None:
    text = arithmetic().replace("{weight: 0.5}", "{weight: 0.5, normalize: true}")
    refused(3, "'normalize' is one value for all models", text)


def test_parameters_of_the_base_are_refused() -> None:
    text = arithmetic(more="  - {model: ./base, parameters: {weight: 0.5}}\n")
    refused(3, "parameters of the base model have no effect", text)


def test_a_misspelt_method_is_refused_before_any_byte_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_reading(monkeypatch)
    said = "unknown method 'dare-ties'; did you mean 'dare_ties'?"
    refused(3, said, three("dare-ties", "weight: 0.5, density: 0.5"))


def test_all_faults_of_plan_and_sources_are_in_one_report() -> None:
    text = arithmetic("./nowhere", more="normalize: false\nmodles: oops\n")
    result = cli("merge", "-", "out", text=text)
    assert result.exit_code == 3
    lines = result.stderr.splitlines()
    assert [line.split(":")[1] for line in lines[:-1]] == ["4", "5", "6"]
    assert "no such folder" in lines[0]


TEN_MISTAKES = """\
merge_method: dare-ties
base_model: ./base
dtype: bf16
modles: oops
models:
  - model: ./maths
    parameters:
      wieght: 2
      weight: heavy
      density: [{value: 0.5, filter: self_atn}, {value: 1.5}]
  - model: ./wide
    parameters:
      weight: 1
      weight: 0.5
      lambda: 2
  - model: ./base
    parameters: {density: 0.5}
parameters:
  normalise: true
then:
  - lfit
"""


@pytest.mark.parametrize("command", ["check", "merge"])
def test_ten_mistakes_and_more_are_in_one_report_before_a_weight_is_read(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = weights(1) | {"model.norm.weight": torch.ones(9)}
    write_checkpoint(Path("wide"), wide, config=CONFIG)
    no_reading(monkeypatch)
    out = ["out"] if command == "merge" else []
    result = cli(command, "-", *out, text=TEN_MISTAKES)
    assert result.exit_code == 3
    *faults, hint = result.stderr.splitlines()
    found = dict(line.removeprefix("plan:").split(": ", 1) for line in faults)
    expected = {
        "1:15": "unknown method 'dare-ties'; did you mean 'dare_ties'?",
        "3:8": "'bf16' is not a dtype of merged weights; did you mean 'bfloat16'?",
        "4:1": "unknown key 'modles'; did you mean 'models'?",
        "8:7": "unknown key 'wieght' under parameters; did you mean 'weight'?",
        "9:15": "weight must be a number; got 'heavy'",
        "10:38": "filter 'self_atn' matches no tensor; nearest: self_attn",
        "10:57": "density must be at most 1; got 1.5",
        "11:12": "./wide: model.norm.weight has shape [9], not [8] as in ./base",
        "14:7": "key 'weight' is given twice (first on line 13); keep one",
        "15:7": "'lambda' is one value for all models, without effect under one",
        "17:5": "parameters of the base model have no effect",
        "19:3": "unknown key 'normalise' under parameters; did you mean 'normalize'?",
        "21:5": "unknown method 'lfit'; did you mean 'lift'?",
    }
    assert list(found) == list(expected)
    for place, said in expected.items():
        assert said.partition("; did you mean 'lift'")[0] in found[place]
    assert hint.startswith("hint: mergekit reads 7 of these 13 without effect")
    assert not Path("out").exists() and not Path("out.part").exists()


def test_a_key_given_twice_is_refused() -> None:
    refused(3, "key 'name' is given twice", arithmetic(more="name: a\nname: b\n"))


def test_1e_5_is_a_number() -> None:
    merged(arithmetic(weight="1e-1"))
    base, maths, out = tensors("base"), tensors("maths"), tensors()
    name = "model.norm.weight"
    expected = base[name].double() + 0.1 * (maths[name].double() - base[name].double())
    assert torch.allclose(out[name].double(), expected, atol=1e-6)


def test_a_tensor_that_a_model_lacks_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    less = {name: t for name, t in weights(1).items() if name != "model.norm.weight"}
    write_checkpoint(Path("less"), less, config=CONFIG)
    no_reading(monkeypatch)
    refused(4, "./less lacks 1 tensor (model.norm.weight) of ./base", arithmetic("./less"))


def test_a_tensor_of_another_shape_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = weights(1) | {"model.norm.weight": torch.ones(9)}
    write_checkpoint(Path("wide"), wide, config=CONFIG)
    no_reading(monkeypatch)
    refused(4, "model.norm.weight has shape [9], not [8]", arithmetic("./wide"))


def test_a_vocabulary_of_another_length_is_refused_with_both_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longer = weights(1) | {"model.embed_tokens.weight": torch.ones(20, 8)}
    write_checkpoint(Path("longer"), longer, config=CONFIG)
    no_reading(monkeypatch)
    said = "model.embed_tokens.weight has shape [20, 8], not [16, 8]"
    refused(4, said, arithmetic("./longer"))


MTP = {"mtp.layers.0.eh_proj.weight": torch.ones(8, 8), "mtp.layers.0.norm.weight": torch.ones(8)}


def test_tensors_that_no_architecture_knows_are_kept() -> None:
    for seed, name in enumerate(("base", "maths")):
        extra = {key: (seed + 1) * value for key, value in MTP.items()}
        write_checkpoint(Path(name), weights(seed, **extra), config=CONFIG)
    merged(arithmetic())
    out = tensors()
    assert out.keys() == tensors("base").keys()
    assert torch.equal(out["mtp.layers.0.eh_proj.weight"], torch.full((8, 8), 1.5))


def test_tensors_that_only_a_tuned_model_has_are_named_everywhere() -> None:
    write_checkpoint(Path("mtp"), weights(1, **MTP), config=CONFIG)
    said = "./mtp: 2 tensors (mtp.layers.0.eh_proj.weight, mtp.layers.0.norm.weight) not in ./base"
    assert said in merged(arithmetic("./mtp")).stdout
    report = json.loads(merged(arithmetic("./mtp"), "again", "--json").stdout)
    assert said in report["notes"][0]
    lock = json.loads(Path("out/mergekit_ft.lock.json").read_text())
    assert lock["unused"] == report["receipt"]["unused"] == {"./mtp": sorted(MTP)}
    assert not MTP.keys() & tensors().keys()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("weight", ["0.5", "1.0", "0.0"])
def test_a_value_that_is_not_finite_is_refused_by_name_and_place(value: str, weight: str) -> None:
    spoilt = weights(1)
    spoilt["model.layers.1.mlp.up_proj.weight"][3, 2] = float(value)
    write_checkpoint(Path("spoilt"), spoilt, config=CONFIG)
    if weight == "0.0":  # the base comes out and nothing of the model goes in
        refused(5, "nothing changed", arithmetic("./spoilt", weight=weight))
        return
    said = f"./spoilt: model.layers.1.mlp.up_proj.weight holds {value} at element 26"
    refused(5, said, arithmetic("./spoilt", weight=weight))
    assert not Path("out").exists()


EVERY_METHOD = [
    "linear: weight: 0.5",
    "task_arithmetic: weight: 0.5",
    "ties: weight: 0.5, density: 0.3",
    "ties: weight: 0.5, density: 0.3, rescale: true",
    "ties: weight: 0.5, density: 0.3, scope: model",
    "dare_linear: weight: 0.5, density: 0.3",
    "dare_ties: weight: 0.5, density: 0.3",
    "slerp: t: 0.5",
    "lines: gamma: 0.5",
]


@pytest.mark.parametrize("plan", EVERY_METHOD)
def test_a_value_that_is_no_number_gets_past_no_method(plan: str) -> None:
    method, _, parameters = plan.partition(": ")
    spoilt = weights(1)
    spoilt["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    write_checkpoint(Path("spoilt"), spoilt, config=CONFIG)
    chat = "" if method in ("slerp", "lines") else "  - model: ./chat\n"
    base = "" if method == "linear" else "base_model: ./base\n"
    text = f"merge_method: {method}\n{base}models:\n  - model: ./spoilt\n{chat}"
    said = "./spoilt: model.layers.1.mlp.up_proj.weight holds nan at element 26"
    refused(5, said, f"{text}parameters: {{{parameters}}}\n")


def test_a_value_that_is_not_finite_in_the_base_is_refused() -> None:
    spoilt = weights(0)
    spoilt["lm_head.weight"][0, 0] = float("nan")
    write_checkpoint(Path("base"), spoilt, config=CONFIG)
    refused(5, "./base: lm_head.weight holds nan at element 0", arithmetic())


def test_a_merge_that_overflows_its_dtype_is_refused() -> None:
    for name, value in (("base", 1.0), ("maths", 60000.0)):
        halves = {key: torch.full_like(t, value) for key, t in weights(0).items()}
        halves = {key: t.half() for key, t in halves.items()}
        write_checkpoint(Path(name), halves, config=CONFIG)
    refused(5, "does not fit F16 though all sources are finite", arithmetic(weight="3"))


@pytest.mark.parametrize("kind", ["scales", "config"])
def test_quantised_sources_are_refused_by_name(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, config = "model.layers.0.mlp.up_proj.weight", dict(CONFIG)
    packed: dict[str, Any] = weights(1)
    packed[name] = packed[name].to(torch.float8_e4m3fn)
    if kind == "scales":
        packed[name + "_scale"] = torch.ones(1)
    else:
        config["quantization_config"] = {"quant_method": "compressed-tensors"}
    write_checkpoint(Path("packed"), packed, config=config)
    no_reading(monkeypatch)
    refused(4, "./packed: quantised (", arithmetic("./packed"))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear", "slerp"])
def test_a_result_that_equals_the_base_is_refused(method: str) -> None:
    write_checkpoint(Path("copy"), weights(0), config=CONFIG)
    text = f"merge_method: {method}\nbase_model: ./base\nmodels:\n  - model: ./copy\n"
    text += "parameters: {t: 0.3}\n" if method == "slerp" else "parameters: {weight: 1}\n"
    refused(5, "nothing changed: every tensor equals ./base", text)


def test_a_result_that_equals_the_base_is_made_where_it_is_asked_for() -> None:
    write_checkpoint(Path("copy"), weights(0), config=CONFIG)
    result = merged(arithmetic("./copy"), "out", "--allow-unchanged")
    assert "changed 0 of 12 tensors" in result.stdout
    assert same_bytes(tensors(), tensors("base")) == set(weights(0))


def test_a_shard_that_is_cut_short_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(Path("shards"), weights(1), shards=3, config=CONFIG)
    file = Path("shards/model-00002-of-00003.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    no_reading(monkeypatch)
    refused(4, "model-00002-of-00003.safetensors: truncated", arithmetic("./shards"))


def test_a_shard_that_is_missing_is_refused() -> None:
    write_checkpoint(Path("shards"), weights(1), shards=3, config=CONFIG)
    Path("shards/model-00002-of-00003.safetensors").unlink()
    refused(4, "model-00002-of-00003.safetensors", arithmetic("./shards"))


def test_a_header_that_claims_more_than_the_file_is_refused() -> None:
    file = Path("maths/model.safetensors")
    file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:])
    refused(4, "maths/model.safetensors", arithmetic())


@pytest.mark.parametrize("name", ["base", "maths"])
def test_a_model_that_is_saved_again_during_the_merge_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Writer.write

    def saving(*given: Any) -> Any:
        write_checkpoint(Path(name), weights(7), config=CONFIG)
        return write(*given)

    monkeypatch.setattr(Writer, "write", saving)
    refused(4, f"{name}/model.safetensors: ", arithmetic())
    assert not Path("out").exists()


def test_a_pickle_is_refused_with_the_way_out() -> None:
    Path("pickled").mkdir()
    torch.save(weights(1), "pickled/pytorch_model.bin")
    Path("pickled/config.json").write_text(json.dumps(CONFIG))
    refused(4, "--allow-pickle", arithmetic("./pickled"))
    assert "changed 12 of 12" in merged(arithmetic("./pickled"), "out", "--allow-pickle").stdout


def test_home_is_expanded(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(models))
    monkeypatch.setenv("USERPROFILE", str(models))
    merged(arithmetic("~/maths", "~/base"))


@pytest.mark.parametrize("name", ["a+b", "a@b", "a b", "ä=1"])
def test_a_path_with_signs_in_it_is_a_path(name: str) -> None:
    Path("maths").rename(name)
    merged(arithmetic(f"'./{name}'"))


def test_configs_that_give_the_weights_another_meaning_are_told() -> None:
    config = {**CONFIG, "rope_theta": 1000000.0, "tie_word_embeddings": True}
    write_checkpoint(Path("far"), weights(1), config=config)
    result = merged(arithmetic("./far"))
    assert "note: rope_theta: 10000.0 in ./base, 1000000.0 in ./far" in result.stdout
    assert "note: tie_word_embeddings: false in ./base, true in ./far" in result.stdout
    assert json.loads(Path("out/config.json").read_text())["rope_theta"] == 10000.0
