"""A plan over real architectures: into files, into a mapping, into a model."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mergekit_ft
from mergekit_ft.engine import Result
from mergekit_ft.errors import OperatorError, PlanError
from tests.checkpoints import tiny_gpt2, tiny_llama, tiny_t5, write_checkpoint
from tests.small_models import CONFIG, arithmetic, same_bytes, tensors, three, weights, write_models

Maker = Callable[..., Path]
PLANS = {
    "linear": three("linear", "weight: 0.5").replace("base_model: ./base\n", ""),
    "slerp": "merge_method: slerp\nbase_model: ./base\nmodels: [model: ./maths]\n"
    "parameters: {t: [0.2, 0.8]}\n",
    "task_arithmetic": three("task_arithmetic", "weight: 0.4"),
    "ties": three("ties", "weight: 0.4, density: 0.4"),
    "ties over the model": three(
        "ties", "weight: 0.4, density: 0.4", "parameters: {scope: model}\n"
    ),
    "dare_linear": three("dare_linear", "weight: 0.4, density: 0.4"),
    "dare_ties": three("dare_ties", "weight: 0.4, density: 0.4"),
    "lines": three("ties", "weight: 0.4, density: 0.4", "then: [lines: {alpha: auto, beta: 1}]\n"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in an empty folder."""
    monkeypatch.setenv("MERGEKIT_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(maker: Maker, **options: Any) -> None:
    for seed, name in enumerate(("base", "maths", "chat")):
        maker(Path(name), seed=seed, **options)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_files_and_mapping_hold_the_same_bits(folder: Path, plan: str) -> None:
    write_models(folder)
    mergekit_ft.merge(plan, "out")
    with mergekit_ft.open_plan(plan) as opened:
        assert len(opened) == 12
        one_by_one = {name: opened[name] for name in reversed(list(opened))}
    assert same_bytes(tensors(), one_by_one) == set(weights(0))


@pytest.mark.parametrize(
    ("maker", "options"),
    [
        (tiny_llama, {}),
        (tiny_llama, {"tie_word_embeddings": True}),
        (tiny_llama, {"dtype": torch.bfloat16, "shards": 3}),
        (tiny_gpt2, {}),
        (tiny_t5, {}),
    ],
    ids=["llama", "llama, tied", "llama, bfloat16 in shards", "gpt2", "t5"],
)
def test_a_loaded_model_answers_like_the_one_on_disk(maker: Maker, options: dict[str, Any]) -> None:
    make(maker, **options)
    plan = PLANS["lines"]
    mergekit_ft.merge(plan, "out")
    loaded = mergekit_ft.load(plan).eval()
    stored = type(loaded).from_pretrained("out").eval()
    assert loaded.dtype == stored.dtype == options.get("dtype", torch.float32)
    ids = {"input_ids": torch.arange(24).reshape(2, 12)}
    if maker is tiny_t5:
        ids["decoder_input_ids"] = ids["input_ids"]
    with torch.no_grad():
        answers = [model(**ids).logits for model in (loaded, stored)]
    assert torch.equal(*answers)
    assert loaded.config.to_diff_dict() | {"_name_or_path": ""} == (
        stored.config.to_diff_dict() | {"_name_or_path": ""}
    )


def test_a_loaded_model_stops_where_the_one_on_disk_does() -> None:
    make(tiny_llama)
    Path("base/generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert mergekit_ft.load(PLANS["ties"]).generation_config.eos_token_id == [7, 8]


def test_the_class_of_a_loaded_model_can_be_chosen() -> None:
    make(tiny_llama)
    model = mergekit_ft.load(PLANS["linear"], model_class=transformers.LlamaForCausalLM)
    assert type(model) is transformers.LlamaForCausalLM


def test_a_config_that_names_no_class_says_what_to_pass() -> None:
    make(tiny_llama)
    config = json.loads(Path("base/config.json").read_text()) | {"architectures": ["Elsewhere"]}
    Path("base/config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match=r"'Elsewhere'.*pass model_class"):
        mergekit_ft.load(PLANS["ties"])


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_tied_head_on_disk_stays_equal_to_its_embedding(plan: str) -> None:
    for seed, name in enumerate(("base", "maths", "chat")):
        made = weights(seed)
        made["lm_head.weight"] = made["model.embed_tokens.weight"]
        write_checkpoint(Path(name), made, config=CONFIG | {"tie_word_embeddings": True})
    mergekit_ft.merge(plan, "out")
    out = tensors()
    assert torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"])
    assert not torch.equal(out["lm_head.weight"], tensors("maths")["lm_head.weight"])


def test_a_model_that_stores_no_head_merges_with_one_that_does(folder: Path) -> None:
    write_models(folder)
    tied = {name: t for name, t in weights(1).items() if name != "lm_head.weight"}
    write_checkpoint(Path("tied"), tied, config=CONFIG | {"tie_word_embeddings": True})
    result = mergekit_ft.merge(arithmetic("./tied"), "out")
    base, embedding = tensors("base"), tied["model.embed_tokens.weight"]
    expected = base["lm_head.weight"] + 0.5 * (embedding - base["lm_head.weight"])
    assert torch.allclose(tensors()["lm_head.weight"], expected, atol=1e-6)
    assert any(note.startswith("tie_word_embeddings") for note in result.notes)


def test_sources_may_be_cut_into_files_in_different_ways(folder: Path) -> None:
    write_models(folder)
    mergekit_ft.merge(PLANS["ties"], "whole")
    for seed, name, shards in ((1, "maths", 3), (2, "chat", 2)):
        Path(name, "model.safetensors").unlink()
        backwards = dict(reversed(weights(seed).items()))
        write_checkpoint(Path(name), backwards, shards=shards, config=CONFIG)
    mergekit_ft.merge(PLANS["ties"], "out")
    assert [path.name for path in Path("out").glob("*.safetensors*")] == ["model.safetensors"]
    assert same_bytes(tensors(), tensors("whole")) == set(weights(0))


def test_shards_of_the_base_are_kept_and_can_be_cut_anew(folder: Path) -> None:
    write_checkpoint(Path("base"), weights(0), shards=3, config=CONFIG)
    write_checkpoint(Path("maths"), weights(1), config=CONFIG)
    mergekit_ft.merge(arithmetic(), "kept")
    mergekit_ft.merge(arithmetic(), "anew", max_shard_size=1000)
    mergekit_ft.merge(arithmetic(), "one", max_shard_size=1 << 30)
    index = "model.safetensors.index.json"
    kept = json.loads(Path("kept", index).read_text())
    assert kept["weight_map"] == json.loads(Path("base", index).read_text())["weight_map"]
    files = list(Path("anew").glob("*.safetensors"))
    assert len(files) == len(
        set(json.loads(Path("anew", index).read_text())["weight_map"].values())
    )
    assert len(files) > 3 and not Path("one", index).exists()
    assert len(same_bytes(tensors("kept"), tensors("anew"))) == 12
    assert len(same_bytes(tensors("kept"), tensors("one"))) == 12


def test_the_order_of_models_changes_no_weighted_average_beyond_rounding(folder: Path) -> None:
    write_models(folder)
    *head, maths, chat = PLANS["linear"].splitlines()
    mergekit_ft.merge(PLANS["linear"], "one")
    mergekit_ft.merge("\n".join([*head, chat, maths]) + "\n", "other")
    one, other = tensors("one"), tensors("other")
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_a_base_that_is_listed_as_a_model_has_no_delta(folder: Path) -> None:
    write_models(folder)
    more = "  - model: ./base\n"
    mergekit_ft.merge(arithmetic(), "without")
    mergekit_ft.merge(arithmetic(more=more), "with")
    assert same_bytes(tensors("with"), tensors("without")) == set(weights(0))


def test_a_plan_is_a_file_a_text_or_a_mapping(folder: Path) -> None:
    write_models(folder)
    Path("plan.yaml").write_text(arithmetic())
    entry = {"model": "./maths", "parameters": {"weight": 0.5}}
    mapping = {"merge_method": "task_arithmetic", "base_model": "./base", "models": [entry]}
    plans: list[Any] = ["plan.yaml", Path("plan.yaml"), arithmetic(), mapping]
    for number, plan in enumerate(plans):
        mergekit_ft.merge(plan, Path(str(number)))
        assert len(same_bytes(tensors("0"), tensors(str(number)))) == 12


def test_lines_after_a_merge_is_a_gradient_of_lambda() -> None:
    make(tiny_llama, layers=4)
    given = "weight: 0.4, density: 0.4"
    mergekit_ft.merge(three("ties", given, "then: [lines: {alpha: 0.25, beta: 0.5}]\n"), "lines")
    mergekit_ft.merge(three("ties", given, "parameters: {lambda: [0.25, 0.75]}\n"), "gradient")
    mergekit_ft.merge(three("ties", given), "plain")
    lines, gradient, plain = (tensors(out) for out in ("lines", "gradient", "plain"))
    assert same_bytes(lines, gradient) == set(plain)
    base, last = tensors("base"), "model.layers.3.mlp.up_proj.weight"
    assert torch.allclose(lines[last] - base[last], 0.75 * (plain[last] - base[last]), atol=1e-6)


class Watched:
    """Counts what it hears."""

    def __init__(self) -> None:
        self.total, self.moved, self.closed = 0, 0, 0
        self._lock = threading.Lock()

    def start(self, total_bytes: int, what: str) -> None:
        self.total = total_bytes
        assert "out" in what

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self.moved += nbytes

    def close(self) -> None:
        self.closed += 1


def test_progress_adds_up_to_what_was_announced_and_to_the_result(folder: Path) -> None:
    write_models(folder)
    write_checkpoint(Path("maths"), weights(1, dtype=torch.bfloat16), config=CONFIG)
    watched = Watched()
    result = mergekit_ft.merge(PLANS["task_arithmetic"], "out", progress=watched, threads=3)
    size = sum(t.numel() for t in weights(0).values())
    assert watched.total == watched.moved == size * (4 + 2 + 4 + 4)
    assert (result.bytes_read, result.bytes_written) == (size * 10, size * 4)
    assert watched.closed >= 1


def test_the_result_says_what_changed(folder: Path) -> None:
    write_models(folder)
    only = weights(0) | {"model.norm.weight": weights(1)["model.norm.weight"]}
    write_checkpoint(Path("maths"), only, config=CONFIG)
    result = mergekit_ft.merge(arithmetic(), "out")
    assert isinstance(result, Result)
    assert (result.out, result.tensors, result.changed) == (Path("out"), 12, 1)
    assert [name for name, yes in result.receipt["changed"].items() if yes] == ["model.norm.weight"]
    assert result.receipt == {
        key: value
        for key, value in json.loads(Path("out/mergekit_ft.lock.json").read_text()).items()
        if key != "identity"
    }


def test_integers_come_along_and_must_be_equal(folder: Path) -> None:
    for seed, name in enumerate(("base", "maths")):
        extra = {"model.position_ids": torch.arange(600_000)}
        write_checkpoint(Path(name), weights(seed, **extra), config=CONFIG)
    mergekit_ft.merge(arithmetic(), "out")
    assert torch.equal(tensors()["model.position_ids"], torch.arange(600_000))
    other = torch.arange(600_000)
    other[-1] = 0
    write_checkpoint(Path("maths"), weights(1, **{"model.position_ids": other}), config=CONFIG)
    with pytest.raises(OperatorError, match="position_ids: I64 values do not merge"):
        mergekit_ft.merge(arithmetic(), "again")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts files in /proc")
def test_every_file_is_closed_and_every_thread_ends_after_success_and_error(folder: Path) -> None:
    write_models(folder)
    spoilt = weights(1)
    spoilt["lm_head.weight"][0, 0] = float("nan")
    write_checkpoint(Path("spoilt"), spoilt, config=CONFIG)
    mergekit_ft.merge(arithmetic(), "warm")
    torch.set_num_threads(2)
    before = open_files(), threading.active_count(), torch.get_num_threads()
    for number in range(5):
        mergekit_ft.merge(PLANS["ties"], f"{number}", threads=3)
        with pytest.raises(OperatorError):
            mergekit_ft.merge(arithmetic("./spoilt"), f"bad{number}", threads=3)
        with pytest.raises(PlanError):
            mergekit_ft.merge(arithmetic(weight="x"), f"bad{number}")
        with mergekit_ft.open_plan(PLANS["ties"]) as opened:
            dict(opened)
    assert (open_files(), threading.active_count(), torch.get_num_threads()) == before


def test_a_budget_below_one_block_is_refused_with_the_number_that_would_do(folder: Path) -> None:
    write_models(folder)
    with pytest.raises(OperatorError, match=r"need at least [\d,]+ bytes of memory") as error:
        mergekit_ft.merge(arithmetic(), "out", memory=1000, threads=2)
    enough = int(str(error.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    mergekit_ft.merge(arithmetic(), "out", memory=enough, threads=2)
    with pytest.raises(OperatorError):
        mergekit_ft.merge(arithmetic(), "less", memory=enough - 1, threads=2)


def test_one_model_at_weight_1_and_the_base_alone_come_out_bit_for_bit(folder: Path) -> None:
    write_models(folder)
    odd = {name: t.clone() for name, t in weights(1).items()}
    odd["model.norm.weight"][:4] = torch.tensor([-0.0, 1e-45, -1e-40, 3e38])
    write_checkpoint(Path("maths"), odd, config=CONFIG)
    for method in ("linear", "task_arithmetic", "ties"):
        text = arithmetic(weight="1").replace("task_arithmetic", method)
        text = text.replace("base_model: ./base\n", "") if method == "linear" else text
        mergekit_ft.merge(text, method)
        assert same_bytes(tensors(method), odd) == set(odd)
