"""What each works alone must work together: stacks, tokens, adapters, FP8, experts, stages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mergekit_ft
from mergekit_ft.writer import Writer
from tests.checkpoints import tiny_llama, write_checkpoint
from tests.small_models import CONFIG, cli, hashes, merged, refused, tensors, weights
from tests.test_sources_fp8 import compressed
from tests.test_sources_names import fused, mixture
from tests.vocabularies import embedding, ids, words

WIDTH, Q = 8, "self_attn.q_proj"
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
TOKENS = {"a": ("<unk>", "the", "cat"), "b": ("<unk>", "dog", "the")}
UNION = ("<unk>", "the", "cat", "dog")
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in a folder with ./a and ./b of three layers, ./lora and ./twin for their queries."""
    monkeypatch.setenv("MERGEKIT_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(TOKENS):
        write(name, worded(number, len(TOKENS[name])), TOKENS[name])
    for seed, name in ((1, "lora"), (2, "twin")):
        write_adapter(name, seed)


def worded(number: int, rows: int, layers: int = 3) -> Tensors:
    """Return weights whose embedding and head tell models and tokens apart."""
    table = embedding(number, rows, WIDTH)
    return weights(number, width=WIDTH, layers=layers) | {EMBED: table, HEAD: -table}


def write(name: str, held: Tensors, tokens: tuple[str, ...] = (), **more: Any) -> None:
    layers = len({name.split(".")[2] for name in held if ".layers." in name})
    config = {**CONFIG, "num_hidden_layers": layers, **more}
    if tokens:
        config["vocab_size"] = len(tokens)
    write_checkpoint(Path(name), held, config=config)
    if tokens:
        words(*tokens).save(f"{name}/tokenizer.json")


def write_adapter(name: str, seed: int) -> None:
    """Write an adapter of rank 2 at scale 3/2 on the queries of all three layers."""
    Path(name).mkdir()
    held = {}
    for layer, (a, b) in enumerate(factors(seed)):
        stem = f"base_model.model.model.layers.{layer}.{Q}"
        held |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    save_file(held, f"{name}/adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 3}
    Path(f"{name}/adapter_config.json").write_text(json.dumps(said))


def factors(seed: int) -> list[tuple[Tensor, Tensor]]:
    dice = torch.Generator().manual_seed(seed)
    shapes = ((2, WIDTH), (WIDTH, 2))
    return [tuple(torch.randn(s, generator=dice) for s in shapes) for _ in range(3)]  # type: ignore[misc]


def adapted(held: Tensors, seed: int) -> Tensors:
    """Return weights with an adapter added in float64."""
    made = dict(held)
    for layer, (a, b) in enumerate(factors(seed)):
        name = f"model.layers.{layer}.{Q}.weight"
        made[name] = (held[name].double() + 1.5 * (b.double() @ a.double())).float()
    return made


def stack(*taken: tuple[Tensors, int, int]) -> Tensors:
    """Return layers [first, end) one above the other, between the first's ends and the last's."""
    made: Tensors = {name: t for name, t in taken[0][0].items() if "embed" in name}
    number = 0
    for held, first, end in taken:
        for layer in range(first, end):
            stem = f"model.layers.{layer}."
            for name, tensor in held.items():
                if name.startswith(stem):
                    made[f"model.layers.{number}.{name.removeprefix(stem)}"] = tensor
            number += 1
    return made | {n: t for n, t in taken[-1][0].items() if n in (NORM, HEAD)}


def in_union(table: Tensor, other: Tensor, mine: str) -> Tensor:
    """Return a table in the union's order, what its model lacks taken from the other's."""
    theirs = "b" if mine == "a" else "a"
    rows = [
        table[TOKENS[mine].index(token)]
        if token in TOKENS[mine]
        else other[TOKENS[theirs].index(token)]
        for token in UNION
    ]
    return torch.stack(rows)


def in_words_of_both(a: Tensors, b: Tensors) -> tuple[Tensors, Tensors]:
    """Return two models in the union of their vocabularies."""
    tables = (EMBED, HEAD)
    return (
        a | {name: in_union(a[name], b[name], "a") for name in tables},
        b | {name: in_union(b[name], a[name], "b") for name in tables},
    )


def passthrough(*sources: str, more: str = "", name: str = "") -> str:
    """Return a plan that stacks; each source is `MODEL, first, end`."""
    lines = "".join(f"  - sources: [{one}]\n" for one in sources)
    named = f"name: {name}\n" if name else ""
    return f"{named}merge_method: passthrough\nslices:\n{lines}{more}"


def source(model: str, first: int, end: int, more: str = "") -> str:
    return f"{{model: {model}, layer_range: [{first}, {end}]{more}}}"


def holds(text: str, wanted: Mapping[str, Tensor], *options: str, within: float = 0.0) -> None:
    """Check, merge, verify and read a plan in memory: each must give these tensors."""
    checked = cli("check", "-", *options, text=text)
    assert checked.exit_code == 0, checked.output
    merged(text, "out", *options)
    made = tensors()
    assert made.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(made[name], tensor, rtol=within, atol=within, msg=name)
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == len(
        {name.split(".")[2] for name in wanted if ".layers." in name}
    )
    verified = cli("verify", "out", "--full")
    assert verified.exit_code == 0, verified.output
    with mergekit_ft.open_plan(text, strict="--strict" in options) as found:
        assert found.keys() == made.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor.view(torch.uint8), made[name].view(torch.uint8)), name


# ---- stacks with tokens and adapters


def test_a_stack_of_two_vocabularies_has_their_union_at_both_ends() -> None:
    a, b = in_words_of_both(tensors("a"), tensors("b"))
    plan = passthrough(source("./a", 0, 2), source("./b", 1, 3), more="tokenizer_source: union\n")
    holds(plan, stack((a, 0, 2), (b, 1, 3)))
    assert ids("out") == {token: row for row, token in enumerate(UNION)}
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == 4


def test_a_stack_of_two_vocabularies_without_a_word_about_them_is_refused() -> None:
    write("b", worded(1, 4), (*TOKENS["b"], "fox"))
    said = refused(4, "tokenizer", passthrough(source("./a", 0, 2), source("./b", 1, 3)))
    assert "./b" in said


@pytest.mark.parametrize(
    "model",
    [
        "./a+./lora",
        "{model: ./a, lora: ./lora}",
        "{model: {path: ./a}, lora: {path: ./lora}}",
        "{path: ./a, adapter: ./lora}",
        "./a, adapter: ./lora",
    ],
)
def test_slices_take_layers_of_a_model_with_an_adapter_however_it_is_written(model: str) -> None:
    held = adapted(tensors("a"), 1)
    # the adapter's layer 0 is in no slice and layer 2 in two
    plan = passthrough(source(model, 1, 3), source("./a", 0, 1), source(model, 2, 3))
    holds(plan, stack((held, 1, 3), (tensors("a"), 0, 1), (held, 2, 3)), within=1e-6)


def test_one_slice_merges_two_adapters_over_their_base() -> None:
    a = tensors("a")
    one, other = adapted(a, 1), adapted(a, 2)
    mix = {
        name: a[name] + 0.5 * (one[name] - a[name]) + 0.25 * (other[name] - a[name]) for name in a
    }
    entries = (
        source("./a+./lora", 0, 2, ", parameters: {weight: 0.5}"),
        source("{model: ./a, lora: ./twin}", 0, 2, ", parameters: {weight: 0.25}"),
    )
    plan = (
        "merge_method: task_arithmetic\nbase_model: ./a\nslices:\n"
        f"  - sources: [{', '.join(entries)}]\n"
    )
    holds(plan, stack((mix, 0, 2)), within=1e-6)


def test_a_stack_with_adapters_and_a_union_of_tokens() -> None:
    a, b = in_words_of_both(adapted(tensors("a"), 1), adapted(tensors("b"), 2))
    plan = passthrough(
        source("./a+./lora", 0, 2),
        source("{path: ./b, adapter: ./twin}", 0, 3),
        more="tokenizer_source: union\n",
    )
    holds(plan, stack((a, 0, 2), (b, 0, 3)), within=1e-6)


def test_an_architecture_that_mergekit_is_told_of_changes_nothing_and_is_said_so() -> None:
    model = "{model: ./a, lora: ./lora, override_architecture: MyLlama}"
    held = adapted(tensors("a"), 1)
    plan = passthrough(source(model, 0, 2), source("./a", 1, 3))
    holds(plan, stack((held, 0, 2), (tensors("a"), 1, 3)), within=1e-6)
    said = cli("check", "-", text=plan).stdout
    assert said.count("./a+./lora: override_architecture (MyLlama) changes nothing") == 1
    assert "MyLlama" not in Path("out/config.json").read_text()


# ---- stacks of FP8 and of experts


def quantise(name: str, held: Tensors, scale: float = 0.25) -> Tensors:
    """Write a model with its queries in FP8 and return what it means."""
    stored, meant = dict(held), dict(held)
    for key in [key for key in held if Q in key]:
        stored[key] = (held[key] / scale).to(torch.float8_e4m3fn)
        stored[f"{key}_scale"] = torch.tensor([scale])
        meant[key] = stored[key].float() * scale
    write(name, stored, dtype="float32", quantization_config=compressed("tensor"))
    return meant


def test_slices_of_an_fp8_model_are_what_its_weights_mean() -> None:
    low = quantise("low", tensors("a"))
    holds(
        passthrough(source("./low", 0, 2), source("./low", 1, 3)), stack((low, 0, 2), (low, 1, 3))
    )
    assert "quantization_config" not in json.loads(Path("out/config.json").read_text())


def test_an_adapter_goes_on_an_fp8_model_in_a_stack_with_a_full_one() -> None:
    low = adapted(quantise("low", tensors("a")), 1)
    plan = passthrough(source("./a", 0, 1), source("./low+./lora", 1, 3))
    holds(plan, stack((tensors("a"), 0, 1), (low, 1, 3)), within=1e-6)


@pytest.mark.parametrize("first", ["apart", "fused"])
def test_slices_of_experts_apart_and_fused_have_the_layout_of_the_first(first: str) -> None:
    layouts: dict[str, Callable[[Tensors], Tensors]] = {"apart": dict, "fused": fused}
    ends = {name: tensors("a")[name] for name in (EMBED, NORM, HEAD)}
    held = {"one": mixture(1) | ends, "two": mixture(2) | ends}
    second = "fused" if first == "apart" else "apart"
    write("one", layouts[first](held["one"]), model_type="qwen3_moe")
    write("two", layouts[second](held["two"]), model_type="qwen3_moe")
    one, two = (layouts[first](part) for part in held.values())
    plan = passthrough(source("./one", 0, 2), source("./two", 1, 2))
    holds(plan, stack((one, 0, 2), (two, 1, 2)))
    both = f"{source('./one', 0, 2)}, {source('./two', 0, 2)}"
    text = f"merge_method: linear\nslices:\n  - sources: [{both}]\nparameters: {{weight: 0.5}}\n"
    mean = {name: (one[name] + two[name]) / 2 for name in one}
    merged(text, "mean")
    for name, tensor in tensors("mean").items():
        torch.testing.assert_close(tensor, mean[name])


# ---- stages of all of it


def tall() -> tuple[str, Tensors]:
    """Return a stage of four layers with adapter and union, and what it means."""
    a, b = in_words_of_both(adapted(tensors("a"), 1), tensors("b"))
    more = "tokenizer_source: union\n"
    plan = passthrough(source("./a+./lora", 0, 2), source("./b", 1, 3), name="tall", more=more)
    return plan, stack((a, 0, 2), (b, 1, 3))


def test_a_stage_with_slices_adapter_and_tokens_merges_with_a_model_on_disk() -> None:
    stage, means = tall()
    write("four", worded(3, 4, layers=4), UNION)
    four = tensors("four")
    mean = {name: (means[name] + four[name]) / 2 for name in means}
    listed = "models: [{model: tall}, {model: ./four}]\nparameters: {weight: 0.5}\n"
    holds(f"{stage}---\nmerge_method: linear\n{listed}", mean, within=1e-5)
    assert ids("out") == ids("four")


def test_a_stack_is_made_of_layers_of_a_stage_that_is_one() -> None:
    stage, means = tall()
    a, _ = in_words_of_both(tensors("a"), tensors("b"))
    outer = passthrough(source("tall", 2, 4), source("./a", 0, 1), source("tall", 0, 3))
    more = "tokenizer_source: union\n"
    wanted = stack((means, 2, 4), (a, 0, 1), (means, 0, 3))
    holds(f"{stage}---\n{outer}{more}", wanted, within=1e-6)


# ---- options, and runs that stop


def test_strict_refuses_what_a_stack_of_unlike_models_disagrees_on() -> None:
    write("b", tensors("b") | {EMBED: worded(1, 3)[EMBED]}, TOKENS["a"], rope_theta=5e5)
    plan = passthrough(source("./a+./lora", 0, 2), source("./b", 1, 3))
    said = merged(plan).stdout
    assert "rope_theta" in said
    strict = cli("merge", "-", "strict", "--strict", text=plan)
    assert strict.exit_code == 4 and "rope_theta" in strict.stderr
    assert not Path("strict").exists()
    same = passthrough(source("./a+./lora", 0, 2), source("./a", 1, 3))
    wanted = stack((adapted(tensors("a"), 1), 0, 2), (tensors("a"), 1, 3))
    Path("out").rename("before")
    holds(same, wanted, "--strict", within=1e-6)


def test_lenient_sets_aside_what_has_no_effect_in_slices_with_adapters() -> None:
    plan = passthrough(
        source("{model: ./a, lora: ./lora}", 0, 2),
        source("./b", 1, 3, ", paramters: {weight: 2}"),
        more="tokenizer_source: union\nnormalise: true\n",
    )
    said = cli("merge", "-", "out", text=plan)
    assert said.exit_code == 3 and "--lenient" in said.stderr
    assert "'paramters'" in said.stderr and "'normalise'" in said.stderr
    merged(plan, "out", "--lenient")
    a, b = in_words_of_both(adapted(tensors("a"), 1), tensors("b"))
    for name, tensor in stack((a, 0, 2), (b, 1, 3)).items():
        torch.testing.assert_close(tensors()[name], tensor, rtol=1e-6, atol=1e-6)
    assert cli("verify", "out", "--full").exit_code == 0


def test_a_stopped_run_of_a_stage_of_everything_is_resumed_to_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage, _ = tall()
    outer = passthrough(source("tall", 1, 4), source("tall", 0, 2))
    Path("plan.yml").write_text(f"{stage}---\n{outer}")
    Path("x").mkdir()
    Path("y").mkdir()
    assert cli("merge", "plan.yml", "x/out", "--threads", "1").exit_code == 0
    written, write = [], Writer.write

    def stopped(*given: Any) -> Any:
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append(given)
        return write(*given)

    monkeypatch.setattr(Writer, "write", stopped)
    assert cli("merge", "plan.yml", "y/out", "--threads", "1").exit_code == 130
    monkeypatch.setattr(Writer, "write", write)
    assert Path("y/out.part").exists() and not Path("y/out").exists()
    assert cli("merge", "plan.yml", "y/out", "--resume").exit_code == 0
    assert hashes("y/out") == hashes("x/out")


def test_load_gives_the_model_of_a_stack_with_an_adapter_and_a_union_of_tokens() -> None:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 16, "num_attention_heads": 1}
    sizes["num_key_value_heads"] = 1
    for seed, name in enumerate(TOKENS):
        Path(name, "model.safetensors").unlink()
        rows = len(TOKENS[name])
        tiny_llama(Path(name), seed=seed, layers=3, vocab_size=rows, **sizes)
    stage, means = tall()
    model = mergekit_ft.load(f"{stage}---\n{passthrough(source('tall', 0, 4))}")
    assert model.config.num_hidden_layers == 4 and model.config.vocab_size == 4
    state = model.state_dict()
    assert state.keys() == means.keys()
    for name, tensor in means.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(model(torch.tensor([[0, 3, 2]])).logits).all()
