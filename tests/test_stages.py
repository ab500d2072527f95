"""Plans of several stages: merges that are sources, with nothing of theirs on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import mergekit_ft
from mergekit_ft.contract import CELL, Block, Grain, Operator
from mergekit_ft.stages import StageReader, source_of
from tests.checkpoints import write_checkpoint
from tests.small_models import (
    CONFIG,
    cli,
    hashes,
    merged,
    no_reading,
    refused,
    tensors,
    weights,
    write_models,
)
from tests.vocabularies import linear, words, write_model

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path)
    return tmp_path


def ties(name: str, density: float = 0.5) -> str:
    models = "".join(
        f"- {{model: ./{m}, parameters: {{weight: 0.7, density: {density}}}}}\n"
        for m in ("maths", "chat")
    )
    return f"name: {name}\nmerge_method: ties\nbase_model: ./base\nmodels:\n{models}"


def slerp(one: str, other: str, name: str = "", t: float = 0.3) -> str:
    named = f"name: {name}\n" if name else ""
    parameters = f"parameters: {{t: {t}}}\n"
    return f"{named}merge_method: slerp\nbase_model: {one}\nmodels:\n- model: {other}\n{parameters}"


def plan(*documents: str) -> str:
    return "---\n".join(documents)


def one_after_the_other(first: str, second: str) -> dict[str, Tensor]:
    """Return what two merges give with the first one written as float32."""
    merged(first.replace("name: first\n", ""), "first-on-disk", "--allow-unchanged")
    merged(second.replace("first", "./first-on-disk"), "second-on-disk")
    return tensors("second-on-disk")


def test_a_stage_is_what_it_would_be_on_disk() -> None:
    last = slerp("./base", "first")
    merged(plan(ties("first"), last))
    made, wanted = tensors(), one_after_the_other(ties("first"), last)
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in made)
    assert not [path for path in Path("out").rglob("*") if "first" in path.name]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("dare_ties", "weight: 0.7, density: 0.5"),  # masks keyed by model, tensor and element
        ("della", "weight: 0.7, density: 0.5, epsilon: 0.1"),  # ranks within rows
        ("sce", ""),  # weights of models from a survey
        ("breadcrumbs", "weight: 1, density: 0.8"),  # two exact quantiles
    ],
)
def test_a_stage_of_any_method_is_what_it_would_be_on_disk(method: str, parameters: str) -> None:
    models = "".join(
        f"- {{model: ./{m}, parameters: {{{parameters}}}}}\n" for m in ("maths", "chat")
    )
    first = f"name: first\nmerge_method: {method}\nbase_model: ./base\nmodels:\n{models}"
    if method == "sce":
        first = first.replace(", parameters: {}", "") + "parameters: {select_topk: 0.7}\n"
    last = slerp("./base", "first")
    merged(plan(first, last))
    made, wanted = tensors(), one_after_the_other(first, last)
    assert all(torch.equal(made[name], wanted[name]) for name in made)


def test_the_order_of_documents_changes_nothing() -> None:
    last = slerp("./base", "first")
    merged(plan(ties("first"), last))
    merged(plan(last, ties("first")), "other")
    assert hashes("out")["model.safetensors"] == hashes("other")["model.safetensors"]


def test_neither_budget_nor_threads_change_a_bit(monkeypatch: Any) -> None:
    big = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(300, 700) for i in range(2)}
    for seed, name in enumerate(("base", "maths", "chat")):
        torch.manual_seed(seed)
        moved = {key: tensor + seed * 0.1 * torch.randn(300, 700) for key, tensor in big.items()}
        write_checkpoint(Path(name), moved, config=CONFIG)
    text = plan(ties("first"), slerp("./chat", "first"))
    merged(text, "one", "--threads", "1")
    merged(text, "two", "--threads", "2", "--memory", "64MiB")
    assert hashes("one")["model.safetensors"] == hashes("two")["model.safetensors"]
    refused(5, "raise --memory", text, "three", "--memory", "9MiB", "--threads", "2")


def test_stages_of_stages_are_computed() -> None:
    half = "merge_method: linear\nmodels:\n- {model: %s, parameters: {weight: 1}}\n"
    half += "- {model: %s, parameters: {weight: 1}}\n"
    text = plan(
        "name: b\n" + half % ("a", "./chat"),
        "name: a\n" + half % ("./base", "./maths"),
        half % ("b", "a"),
    )
    merged(text)
    base, maths, chat = weights(0), weights(1), weights(2)
    for name, made in tensors().items():
        a = (base[name].double() + maths[name].double()) / 2
        torch.testing.assert_close(
            made.double(), ((a + chat[name]) / 2 + a) / 2, rtol=1e-6, atol=1e-7
        )


def test_between_stages_nothing_is_rounded_to_sixteen_bits() -> None:
    for seed, name in enumerate(("base", "maths", "chat")):
        write_checkpoint(Path(name), weights(seed, dtype=torch.bfloat16), config=CONFIG)
    apart = "merge_method: task_arithmetic\nbase_model: ./base\nmodels:\n"
    first = f"name: first\n{apart}- {{model: ./maths, parameters: {{weight: 0.001}}}}\n"
    last = f"{apart}- {{model: first, parameters: {{weight: 1000}}}}\n"
    merged(plan(first, last))
    maths = {name: weight.to(torch.bfloat16) for name, weight in weights(1).items()}
    for name, made in tensors().items():
        assert made.dtype == torch.bfloat16
        close = (made.float() - maths[name].float()).abs() <= 0.02 * maths[
            name
        ].float().abs() + 1e-2
        assert close.all()


def test_the_donors_dtype_is_the_base_stages() -> None:
    for seed, name in enumerate(("base", "maths", "chat")):
        write_checkpoint(Path(name), weights(seed, dtype=torch.bfloat16), config=CONFIG)
    merged(plan(ties("first"), slerp("first", "./chat")))
    assert {tensor.dtype for tensor in tensors().values()} == {torch.bfloat16}
    merged(plan(ties("first") + "dtype: float16\n", slerp("first", "./chat")), "half")
    assert {tensor.dtype for tensor in tensors("half").values()} == {torch.float16}
    said = merged(plan(ties("first") + "dtype: float16\n", slerp("./chat", "first")), "x").stdout
    assert "first: its dtype decides nothing" in said


def test_a_stage_may_survey_the_whole_model() -> None:
    first = ties("first") + "then:\n- lines: {alpha: auto, beta: 0.5}\n"
    last = slerp("./base", "first")
    merged(plan(first, last))
    wanted = one_after_the_other(first, last)
    assert all(torch.equal(made, wanted[name]) for name, made in tensors().items())


def test_a_stage_that_copies_a_model_is_that_model_bit_for_bit() -> None:
    first = (
        "name: first\nmerge_method: linear\nmodels:\n- {model: ./maths, parameters: {weight: 1}}\n"
    )
    last = "merge_method: linear\nmodels:\n- {model: first, parameters: {weight: 1}}\n"
    merged(plan(first, last))
    assert hashes("out")["model.safetensors"] == hashes("maths")["model.safetensors"]


def test_the_receipt_names_every_model_and_verifies() -> None:
    text = plan(ties("first"), slerp("./base", "first"))
    merged(text)
    receipt = json.loads(Path("out/mergekit_ft.lock.json").read_text())
    assert receipt["plan"] == text
    assert [s["reference"] for s in receipt["sources"]] == ["./base", "./maths", "./chat"]
    assert all(source["files"] for source in receipt["sources"])
    found = cli("verify", "out", "--full", "--inputs")
    assert found.exit_code == 0, found.output
    assert "inputs: 3 files of the receipt hashed" in found.stdout
    write_checkpoint(Path("chat"), weights(9), config=CONFIG)
    assert cli("verify", "out").exit_code == 1
    card = Path("out/README.md").read_text()
    assert all(f"`{model}`" in card for model in ("./base", "./maths", "./chat"))


def test_check_shows_the_stages_and_reads_no_weight(monkeypatch: Any) -> None:
    no_reading(monkeypatch)
    found = cli("check", "-", text=plan(ties("first"), slerp("./base", "first")))
    assert found.exit_code == 0, found.output
    assert "first is made as it is read: ties" in found.stdout


def test_faults_of_stages_and_of_the_output_come_in_one_report() -> None:
    bad = plan(
        ties("first").replace("weight: 0.7", "wieght: 0.7", 1),
        ties("second").replace("./chat", "./caht"),
        slerp("frist", "second") + "dtpye: float16\n",
    )
    found = cli("check", "-", text=bad)
    lines = found.stderr.splitlines()
    assert found.exit_code == 3
    assert any("'wieght'" in line and line.startswith("plan:5:") for line in lines)
    assert any("./caht" in line for line in lines)
    assert any("did you mean 'first'? (stages: first, second)" in line for line in lines)
    assert any("'dtpye'" in line for line in lines)


def test_a_filter_of_a_stage_that_matches_nothing_is_a_fault() -> None:
    first = ties("first") + "parameters: {lambda: [{filter: self_atn, value: 1}, {value: 2}]}\n"
    refused(3, "matches no tensor", plan(first, slerp("./base", "first")))


def test_conflicts_within_a_stage_are_told() -> None:
    config = json.loads(Path("maths/config.json").read_text())
    Path("maths/config.json").write_text(json.dumps({**config, "rope_theta": 1e6}))
    text = plan(ties("first"), slerp("./base", "first"))
    assert "note: first: rope_theta: 10000.0 in ./base" in merged(text).stdout
    assert cli("check", "-", "--strict", text=text).exit_code == 4


def test_a_nan_in_a_stages_source_ends_the_merge() -> None:
    sick = weights(1)
    sick["model.norm.weight"][3] = float("nan")
    write_checkpoint(Path("maths"), sick, config=CONFIG)
    refused(5, "element 3", plan(ties("first", 1.0), slerp("./base", "first")))


def test_an_output_in_place_of_a_stages_source_is_refused() -> None:
    text = plan(ties("first"), slerp("./base", "first"))
    refused(6, "./chat", text, "chat", "--overwrite")


def test_a_plan_of_stages_can_be_read_without_being_written() -> None:
    text = plan(ties("first"), slerp("./base", "first"))
    merged(text)
    with mergekit_ft.open_plan(text) as found:
        assert all(torch.equal(found[name], made) for name, made in tensors().items())


def test_a_stage_hands_its_tokenizer_on() -> None:
    write_model(Path("a"), 1, words("x", "cat", "dog", added=["<s>"]))
    write_model(Path("b"), 2, words("x", "dog", "emu", "cat", added=["<s>", "<i>"]))
    write_model(Path("c"), 3, words("x", "gnu", added=["<c>"]))
    union = "tokenizer: {source: union}\n"
    first = "name: first\n" + linear(0.5, 0.5, more=union)
    last = linear(0.5, 0.5, more=union, names=("first", "c")).replace("./first", "first")
    merged(plan(first, last))
    made, wanted = tensors(), one_after_the_other(first, last)
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in made)
    for file in ("tokenizer.json", "config.json", "tokenizer_config.json"):
        assert Path("out", file).read_bytes() == Path("second-on-disk", file).read_bytes()
    assert cli("verify", "out", "--full").exit_code == 0


class Difference(Operator):
    """The first model less the base, over whole tensors; it counts what it is given."""

    grain: ClassVar[Grain] = Grain.TENSOR
    seen: ClassVar[list[str]] = []

    def merge(self, block: Block, finding: Any) -> Tensor:
        self.seen.append(block.name)
        return block.tuned[0].sub_(block.base)


def test_a_tensor_that_is_needed_whole_is_made_once_for_reads_in_order() -> None:
    with mergekit_ft.open_plan(ties("first")) as found:
        resolution = found.resolution
        resolution.tasks = [replace(t, operator=Difference(), copy=None) for t in resolution.tasks]
        reader = StageReader(resolution)
        info = next(i for i in reader.infos() if i.name == "model.embed_tokens.weight")
        made = bytearray(info.nbytes)
        for start in range(0, info.nbytes, 36):
            reader.read_into(info, start, memoryview(made)[start : start + 36])
        assert Difference.seen == [info.name]
        assert reader.overhead > 2 * info.nbytes
    given = torch.frombuffer(made, dtype=torch.float32).view(info.shape)
    torch.testing.assert_close(given, weights(1)[info.name])


def test_any_range_of_bytes_is_what_the_whole_tensor_has() -> None:
    for seed, name in enumerate(("base", "maths", "chat")):
        torch.manual_seed(seed)
        write_checkpoint(Path(name), {"w": torch.randn(3, CELL - 5)}, config=CONFIG)
    with mergekit_ft.open_plan(ties("first")) as found:
        wanted = found["w"].numpy().tobytes()
        source = source_of("first", found.resolution)
        for start in (0, 1, 4 * CELL - 3, 4 * CELL, 8 * CELL + 2, len(wanted) - 1):
            for length in (0, 1, 7, 4 * CELL, 5 * CELL):
                stop = min(start + length, len(wanted))
                into = bytearray(stop - start)
                source.read_into("w", start, memoryview(into))
                assert bytes(into) == wanted[start:stop]
