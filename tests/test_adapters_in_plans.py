"""Adapters as plans name them: streamed, hashed, refused by name where they do not fit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_ft import merge
from mergekit_ft.cli import main
from mergekit_ft.errors import MergekitError, PlanError, SourceError, WriteError
from mergekit_ft.inspection.check import check
from mergekit_ft.inspection.verify import verify
from mergekit_ft.options import Options
from mergekit_ft.plan import ModelReference, read
from mergekit_ft.sources import Source, adapted, open_adapter, open_source
from tests.checkpoints import write_checkpoint

PREFIX = "base_model.model."
UP, HEAD, EMBED = "model.layers.0.mlp.up_proj", "lm_head", "model.embed_tokens"
CONFIG = {"model_type": "llama", "tie_word_embeddings": False}
RANK, ALPHA = 2, 3


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {EMBED: (7, 4), UP: (6, 4), "model.norm": (4,), HEAD: (7, 4)}
    return {
        f"{name}.weight": torch.randn(shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }


def factors(seed: int, module: str = UP, out: int = 6, rank: int = RANK) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, 4, generator=generator),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(out, rank, generator=generator),
    }


def write_adapter(folder: Path | str, tensors: dict[str, Tensor], **words: Any) -> Path:
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **words}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def delta(seed: int) -> Tensor:
    """Work out alpha / r times B @ A in float64."""
    a, b = factors(seed).values()
    return ALPHA / RANK * (b.double() @ a.double())


@pytest.fixture(autouse=True)
def _two_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "base", weights(), config=CONFIG)
    for seed, name in ((1, "a"), (2, "b")):
        write_adapter(name, factors(seed))


def stored(folder: str = "out") -> dict[str, Tensor]:
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def plan(*models: Any, **words: Any) -> dict[str, Any]:
    entries = [
        {**({"model": model} if isinstance(model, str) else model), "parameters": {"weight": 0.5}}
        for model in models
    ]
    return {"merge_method": "task_arithmetic", "base_model": "base", "models": entries, **words}


def on(adapter: str = "a", base: str = "base", **opening: Any) -> Source:
    return adapted(open_source(base), open_adapter(adapter, **opening))


def refusal(adapter: str = "a", base: str = "base") -> str:
    with pytest.raises(SourceError) as caught:
        on(adapter, base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


WAYS: list[dict[str, Any]] = [
    {"model": "base+a"},
    {"model": "base", "adapter": "a"},
    {"model": {"model": "base", "lora": "a"}},
    {"model": {"model": {"path": "base"}, "lora": {"path": "a"}}},
    {"model": {"path": "base", "adapter": "a"}},
    {"model": {"path": "base"}, "adapter": {"path": "a"}},
]


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_can_be_named_in_every_way(way: dict[str, Any]) -> None:
    reading = read(plan(way))
    assert not reading.faults and reading.plan is not None
    assert str(reading.plan.models[0].model) == "base+a"


def test_two_adapters_on_one_base_merge_in_one_plan() -> None:
    merge(plan("base+a", {"model": "base", "adapter": "b"}), "out")
    out, base = stored(), weights()
    wanted = base[f"{UP}.weight"].double() + 0.5 * delta(1) + 0.5 * delta(2)
    assert float((out[f"{UP}.weight"] - wanted).abs().max()) < 1e-6
    for name in base:
        if UP not in name:
            assert torch.equal(out[name], base[name])


def test_the_base_may_have_an_adapter_itself() -> None:
    text = plan("base+b", base_model={"model": "base", "adapter": "a"})
    merge(text, "out")
    wanted = weights()[f"{UP}.weight"].double() + 0.5 * delta(1) + 0.5 * delta(2)
    assert float((stored()[f"{UP}.weight"] - wanted).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_is_rounded_before_the_merge_and_the_bases_dtype_stays(dtype: torch.dtype) -> None:
    write_checkpoint(Path("half"), weights(dtype=dtype), config=CONFIG)
    entry = {"model": "half+a", "parameters": {"weight": 1.0}}
    merge({"merge_method": "linear", "models": [entry]}, "out")
    base = weights(dtype=dtype)[f"{UP}.weight"]
    wanted = (base.double() + delta(1)).to(dtype)
    out = stored()[f"{UP}.weight"]
    assert out.dtype == dtype
    assert float((out != wanted).sum()) <= 1  # float32 may fall on the other side of a tie
    assert torch.equal(stored()[f"{HEAD}.weight"], weights(dtype=dtype)[f"{HEAD}.weight"])


def test_a_float64_base_is_computed_in_float64() -> None:
    write_checkpoint(Path("double"), weights(dtype=torch.float64), config=CONFIG)
    found = on(base="double").tensor(f"{UP}.weight")
    wanted = weights(dtype=torch.float64)[f"{UP}.weight"] + delta(1)
    assert found.dtype == torch.float64 and float((found - wanted).abs().max()) < 1e-14


def test_an_adapter_of_zeros_leaves_the_bases_bits_minus_zero_included() -> None:
    base = weights()
    base[f"{UP}.weight"][0] = torch.tensor([-0.0, 0.0, 1.0, -1.0])
    write_checkpoint(Path("base"), base, config=CONFIG)
    zeros = factors(1)
    zeros[f"{PREFIX}{UP}.lora_B.weight"].zero_()
    write_adapter("a", zeros)
    found = on().tensor(f"{UP}.weight")
    assert torch.equal(found.view(torch.int32), base[f"{UP}.weight"].view(torch.int32))


def large(dora: bool) -> Source:
    """Open a model with a matrix of many tiles, and a transposed one."""
    torch.manual_seed(0)
    big = {"h.0.attn.c_attn.weight": torch.randn(300, 700), "h.0.up.weight": torch.randn(700, 300)}
    write_checkpoint(Path("big"), big, config={"model_type": "gpt2"})
    tensors = {}
    for module in ("h.0.attn.c_attn", "h.0.up"):
        tensors[f"{PREFIX}transformer.{module}.lora_A.weight"] = torch.randn(RANK, 300)
        tensors[f"{PREFIX}transformer.{module}.lora_B.weight"] = torch.randn(700, RANK)
        if dora:
            tensors[f"{PREFIX}transformer.{module}.lora_magnitude_vector"] = torch.rand(700) + 1
    write_adapter("wide", tensors, use_dora=dora)
    return on("wide", "big")


@pytest.mark.parametrize("dora", [False, True])
def test_any_range_of_bytes_is_the_same_as_the_whole_on_any_number_of_threads(dora: bool) -> None:
    source = large(dora)
    for name in source:
        whole = source.tensor(name).numpy().tobytes()
        for start, stop in [(0, 4), (1197, 1203), (260_000, 270_000), (839_996, 840_000)]:
            data = bytearray(stop - start)
            source.read_into(name, start, memoryview(data))
            assert bytes(data) == whole[start:stop]
    assert source.reader.overhead < 4_000_000


@pytest.mark.parametrize("dora", [False, True])
def test_the_bytes_do_not_depend_on_memory_or_threads(dora: bool) -> None:
    large(dora)
    entry = {"model": "big+wide", "parameters": {"weight": 0.7}}
    words = {"merge_method": "task_arithmetic", "base_model": "big", "models": [entry]}
    found = set()
    for threads, memory in ((1, 32 << 20), (2, 1 << 30)):
        merge(words, "out", threads=threads, memory=memory, overwrite=True)
        found.add(Path("out/model.safetensors").read_bytes())
    assert len(found) == 1


def test_a_path_that_exists_wins_over_what_a_plus_would_mean() -> None:
    os.rename("base", "ba+se")
    assert ModelReference.model_validate("ba+se") == ModelReference(path="ba+se")
    both = ModelReference.model_validate("ba+se+a")
    assert (both.path, str(both.adapter)) == ("ba+se", "a")
    merge(plan("ba+se+a", base_model="ba+se"), "out")


def test_revisions_stand_with_each_part_and_two_adapters_are_two_models() -> None:
    both = ModelReference.model_validate("org/m@v1+org/lora@v2")
    assert both.adapter is not None
    assert (both.path, both.revision) == ("org/m", "v1")
    assert (both.adapter.path, both.adapter.revision) == ("org/lora", "v2")
    assert str(both) == "org/m@v1+org/lora@v2"
    assert both.key != ModelReference.model_validate("org/m@v1").key
    assert both.bare == ModelReference.model_validate("org/m@v1")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{model: base+, parameters: {weight: 1}}", "3:13: 'base+' is not MODEL+ADAPTER"),
        ("{model: x+y+z}", "3:13: 'x+y+z' can be cut at more than one '+'"),
        ("{model: base+a, adapter: b}", "3:21: the model has an adapter already"),
        ("{model: base, adapter: [a]}", "3:19: an adapter is PATH, PATH@REVISION"),
        ("{model: base, adapter: a@v1}", "3:19: 'a' is local, where a revision has no effect"),
        ("{model: {model: base, lora: a, adapter: b}}", "'adapter' and 'lora' are one thing"),
        ("{model: base, adaptor: a}", "unknown key 'adaptor'; did you mean 'adapter'?"),
    ],
)
def test_a_faulty_name_of_an_adapter_is_told_with_its_place(entry: str, said: str) -> None:
    text = f"merge_method: task_arithmetic\nmodels:\n  - {entry}\nbase_model: base\n"
    text += "parameters: {weight: 1}\n" if "weight" not in entry else ""
    assert said in "\n".join(map(str, read(text).faults))


def test_check_names_the_adapter_and_counts_what_it_changes() -> None:
    write_adapter("a", factors(1), base_model_name_or_path="org/other")
    report, _ = check(plan("base+a"), Options())
    notes = "\n".join(report["notes"])
    assert "base+a: the adapter changes 1 of 4 tensors (LoRA of rank 2 on 1)" in notes
    assert "the adapter was trained on org/other" in notes
    assert [source["reference"] for source in report["sources"]] == ["base", "base+a"]


def test_the_adapters_files_are_in_the_receipt_and_verify_reads_them_again() -> None:
    merge(plan("base+a"), "out")
    receipt = json.loads(Path("out/mergekit_ft.lock.json").read_text())
    entry = next(e for e in receipt["sources"] if e["reference"] == "base+a")
    assert set(entry["files"]) == {
        "model.safetensors",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
    }
    assert entry["adapter"] == {"reference": "a", "revision": None}
    report = verify(Path("out"), sample=None)
    assert report["inputs"]["checked"] == 4
    assert not report["inputs"]["differ"] and not report["tensors"]["differ"]


@pytest.mark.parametrize("what", ["weights", "alpha"])
def test_a_retrained_adapter_at_the_same_path_is_noticed(what: str) -> None:
    merge(plan("base+a"), "out")
    before = stored()[f"{UP}.weight"]
    if what == "weights":
        write_adapter("a", factors(3))
    else:
        write_adapter("a", factors(1), lora_alpha=5)
    report = verify(Path("out"), sample=None)
    problems = [(entry["file"], entry["problem"]) for entry in report["inputs"]["differ"]]
    assert any(file.startswith("base+a: adapter/") for file, _ in problems)
    assert report["tensors"]["differ"]
    merge(plan("base+a"), "again")
    assert not torch.equal(stored("again")[f"{UP}.weight"], before)


def test_a_run_is_not_resumed_with_a_retrained_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_ft import engine

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine, "_surround", dies)
        with pytest.raises(KeyboardInterrupt):
            merge(plan("base+a"), "out")
    write_adapter("a", factors(3))
    with pytest.raises(WriteError):
        merge(plan("base+a"), "out", resume=True)


def test_an_adapter_named_as_a_model_is_told_how_to_write_it() -> None:
    with pytest.raises(SourceError, match=r"write BASE\+a, or `adapter:` beside its base's `model"):
        open_source("a")


@pytest.mark.parametrize(
    ("tensors", "words", "said"),
    [
        (factors(1, "model.layers.5.mlp.up_proj"), {}, "nearest: model.layers.0.mlp.up_proj.wei"),
        (factors(1) | factors(1, "visual.up"), {}, "1 of the 2 modules and tensors that"),
        (factors(1, HEAD), {}, "goes from 4 to 6, and does not fit lm_head.weight [7, 4]"),
        (factors(1, rank=4), {}, "but its rank is 2 by adapter_config.json"),
        (factors(1), {"rank_pattern": {"up_proj": 4}}, "but its rank is 4"),
        (dict(list(factors(1).items())[:1]), {}, "has no lora_B"),
        (dict(list(factors(1).items())[1:]), {}, "has no lora_A"),
        (factors(1), {"use_dora": True}, "has no magnitude of DoRA"),
        (factors(1), {"lora_bias": True}, "has no bias, but lora_bias is True"),
        (
            factors(1) | {f"{PREFIX}{UP}.lora_magnitude_vector": torch.ones(6)},
            {},
            "has a magnitude of DoRA, but use_dora is False",
        ),
        (
            factors(1) | {f"{PREFIX}{UP}.lora_magnitude_vector": torch.ones(5)},
            {"use_dora": True},
            "has 5 elements, and model.layers.0.mlp.up_proj has 6 outputs",
        ),
        (factors(1) | {f"{PREFIX}{UP}.lora_B.bias": torch.ones(6)}, {}, "to a layer without one"),
        (factors(1) | {"x.lora_A.weight": torch.ones(2, 4)}, {}, "do not begin with base_model."),
        (factors(1) | {f"{PREFIX}{UP}.lora_E": torch.ones(2)}, {}, "lora_E is no part of LoRA"),
        (
            factors(1) | {f"{PREFIX}{UP}.lora_A.default.weight": torch.ones(2)},
            {},
            "default.weight is no part of LoRA",
        ),
        (
            {f"{PREFIX}{EMBED}.weight": torch.ones(9, 4)},
            {},
            "of shape [9, 4], where base has [7, 4]: resize the base",
        ),
        ({f"{PREFIX}{EMBED}.weight": torch.ones(7, 4).int()}, {}, "is I32, which is no weight"),
        (
            {f"{PREFIX}{UP}.lora_{s}.weight": torch.ones(2, 2, 1, 1) for s in "AB"},
            {},
            "is a convolution",
        ),
        ({}, {}, "no tensors"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    tensors: dict[str, Tensor], words: dict[str, Any], said: str
) -> None:
    write_adapter("a", tensors, **words)
    assert said in refusal()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"peft_type": "IA3"}, "an adapter of type IA3, where LORA can be read"),
        ({"peft_type": "LOHA"}, "of type LOHA"),
        ({"peft_type": "ADALORA"}, "of type ADALORA"),
        ({"peft_type": None}, "of type None"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, which changed the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "is olora"),
        ({"init_lora_weights": "corda"}, "is corda"),
        ({"init_lora_weights": "loftq"}, "is loftq"),
        ({"init_lora_weights": "lora_ga"}, "is lora_ga"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "build the deeper model first"),
        ({"target_parameters": ["experts.up"]}, "target_parameters"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"kasa_config": {"x": 1}}, "KaSA"),
        ({"wholly_new": True}, "'wholly_new' is not known and may change"),
        ({"r": 0}, "r is 0, not a whole number from 1"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": None}, "lora_alpha is None, not a number"),
        ({"rank_pattern": {"(": 4}}, "'(' is no pattern"),
        ({"rank_pattern": [4]}, "rank_pattern is not a map"),
        ({"alpha_pattern": {"up": "x"}}, "alpha_pattern: up is 'x'"),
    ],
)
def test_what_cannot_be_done_exactly_is_refused_by_name(words: dict[str, Any], said: str) -> None:
    write_adapter("a", factors(1), **words)
    assert said in refusal()


def test_what_is_of_training_alone_is_taken() -> None:
    words = {"init_lora_weights": "eva", "eva_config": {"rho": 2}, "lora_dropout": 0.1}
    write_adapter("a", factors(1), **words, bias="none", wholly_new=None)
    found = on().tensor(f"{UP}.weight")
    assert float((found - weights()[f"{UP}.weight"] - delta(1)).abs().max()) < 1e-6


@pytest.mark.parametrize("module", [EMBED, HEAD])
@pytest.mark.parametrize("kind", ["saved", "factors"])
def test_an_adapter_on_one_name_of_a_tied_weight_is_refused(module: str, kind: str) -> None:
    tied = weights()
    del tied[f"{HEAD}.weight"]
    write_checkpoint(Path("tied"), tied, config={"model_type": "llama", **TIED})
    if kind == "saved":
        write_adapter("a", {f"{PREFIX}{module}.weight": torch.ones(7, 4)})
    else:
        write_adapter("a", factors(1, module, 7))
    assert "is tied to" in refusal("a", "tied")


TIED = {"tie_word_embeddings": True}


def test_a_tied_weight_that_an_adapter_holds_under_both_names_alike_is_taken() -> None:
    tied = weights()
    del tied[f"{HEAD}.weight"]
    write_checkpoint(Path("tied"), tied, config={"model_type": "llama", **TIED})
    twos = torch.full((7, 4), 2.0)
    write_adapter("a", {f"{PREFIX}{name}.weight": twos.clone() for name in (EMBED, HEAD)})
    source = on("a", "tied")
    assert f"{HEAD}.weight" not in source and torch.equal(source.tensor(f"{EMBED}.weight"), twos)


def test_a_dora_row_without_length_ends_the_run() -> None:
    base = weights()
    base[f"{UP}.weight"].zero_()
    write_checkpoint(Path("base"), base, config=CONFIG)
    tensors = factors(1) | {f"{PREFIX}{UP}.lora_magnitude_vector": torch.ones(6)}
    tensors[f"{PREFIX}{UP}.lora_B.weight"].zero_()
    write_adapter("a", tensors, use_dora=True)
    with pytest.raises(MergekitError, match=r"divides by the norm of output 0 .* which is zero"):
        merge(plan("base+a"), "out")
    assert not Path("out").exists()


def test_an_adapter_that_is_not_finite_is_refused_by_its_name() -> None:
    tensors = factors(1)
    tensors[f"{PREFIX}{UP}.lora_B.weight"][0, 0] = float("nan")
    write_adapter("a", tensors)
    with pytest.raises(MergekitError, match=r"base\+a: .*up_proj.weight holds nan"):
        merge(plan("base+a"), "out")


def test_a_pickled_adapter_is_read_only_where_pickles_are_allowed() -> None:
    os.remove("a/adapter_model.safetensors")
    torch.save(factors(1), "a/adapter_model.bin")
    assert "pass --allow-pickle" in refusal()
    found = on(allow_pickle=True).tensor(f"{UP}.weight")
    assert float((found - weights()[f"{UP}.weight"] - delta(1)).abs().max()) < 1e-6


def test_a_truncated_adapter_is_refused() -> None:
    path = Path("a/adapter_model.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    assert "truncated" in refusal()


def test_an_adapters_own_tokenizer_is_told_of_where_it_differs() -> None:
    Path("base/tokenizer.json").write_text("{}")
    Path("a/tokenizer.json").write_text("{}")
    Path("a/added_tokens.json").write_text('{"<new>": 7}')
    note = next(note for note in on().notes if "are not used" in note)
    assert "added_tokens.json of the adapter's folder" in note


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base+none/such", "none/such: no such folder here"),
        ("base+nowhere", "nowhere: no such folder, and a model on the hub"),
        ("base+base", "base: holds no adapter_config.json, so it is no adapter"),
        ("base+a/adapter_model.safetensors", "is a file, and an adapter is a folder"),
    ],
)
def test_an_adapter_that_is_not_there_is_told_at_its_line(name: str, said: str) -> None:
    text = f"merge_method: linear\nmodels:\n  - {{model: {name}, parameters: {{weight: 1}}}}\n"
    result = CliRunner().invoke(main, ["merge", "-", "out", "--offline"], input=text)
    assert result.exit_code == 4
    assert said in result.stderr and ":3:" in result.stderr


def test_a_multiple_of_rank_is_held_in_memory_and_never_the_product() -> None:
    torch.manual_seed(0)
    write_checkpoint(Path("tall"), {"up.weight": torch.zeros(4096, 512)}, config={})
    tensors = {
        f"{PREFIX}up.lora_A.weight": torch.randn(RANK, 512),
        f"{PREFIX}up.lora_B.weight": torch.randn(4096, RANK),
    }
    write_adapter("a", tensors)
    source = on("a", "tall")
    assert source.reader.overhead < 2_000_000 < 4096 * 512 * 4
    wanted = (
        ALPHA
        / RANK
        * tensors[f"{PREFIX}up.lora_B.weight"]
        @ load_file("a/adapter_model.safetensors")[f"{PREFIX}up.lora_A.weight"]
    )
    assert torch.allclose(source.tensor("up.weight"), wanted, atol=1e-6)


def test_faults_of_the_plan_and_of_an_adapter_come_in_one_report() -> None:
    write_adapter("a", factors(1, "other"))
    text = "merge_method: task_arithmetic\nbase_model: base\nmodels:\n"
    text += "  - {model: base+a, parameters: {wieght: 1}}\n  - {model: base+b}\n"
    with pytest.raises(PlanError) as caught:
        merge(text, "out")
    said = str(caught.value)
    assert "wieght" in said and "for other.weight" in said


@pytest.mark.parametrize(
    ("there", "trained"),
    [
        ("h.0.attn.up", "transformer.h.0.attn.up"),
        ("bert.layer.0.up", "layer.0.up"),
        ("model.layers.0.up", "model.language_model.layers.0.up"),
        ("language_model.model.layers.0.up", "model.language_model.layers.0.up"),
        ("model.language_model.layers.0.up", "language_model.model.layers.0.up"),
        ("visual.up", "model.visual.up"),
    ],
)
def test_names_that_differ_by_how_the_model_is_wrapped_are_found(there: str, trained: str) -> None:
    write_checkpoint(Path("other"), {f"{there}.weight": torch.zeros(6, 4)}, config={})
    write_adapter("a", factors(1, trained))
    found = on("a", "other").tensor(f"{there}.weight")
    assert float((found - delta(1)).abs().max()) < 1e-6


def test_an_adapter_goes_on_an_fp8_model_as_on_what_that_means() -> None:
    narrow = weights()[f"{UP}.weight"].to(torch.float8_e4m3fn)
    tensors = weights() | {f"{UP}.weight": narrow, f"{UP}.weight_scale_inv": torch.tensor(0.5)}
    words = CONFIG | {"dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}
    write_checkpoint(Path("fp8"), tensors, config=words)
    source = on("a", "fp8")
    found = source.tensor(f"{UP}.weight")
    assert float((found - narrow.float() * 0.5 - delta(1)).abs().max()) < 1e-6
    assert source[f"{UP}.weight"].kept == "BF16"
    assert source.edits == {"quantization_config": None}


def test_verify_finds_a_model_and_its_adapter_where_they_are_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(plan("base+a"), "out")
    (tmp_path / "moved").mkdir()
    for name in ("base", "a"):
        os.rename(name, f"moved/{name}")
    monkeypatch.chdir("/")
    report = verify(tmp_path / "out", sample=None, root=tmp_path / "moved")
    assert report["inputs"]["checked"] == 4 and not report["inputs"]["differ"]
    assert report["tensors"]["recomputed"] == 4 and not report["tensors"]["differ"]
