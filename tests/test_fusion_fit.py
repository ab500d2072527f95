"""Fits of fused logits from plans: what models say is kept, weights are found and told."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_ft import registry
from mergekit_ft.data.neutral import NEUTRAL
from mergekit_ft.errors import PlanError, SourceError, WriteError
from mergekit_ft.fusion import fit, recording
from mergekit_ft.fusion.collecting import Collection
from mergekit_ft.fusion.weights import read_weights
from mergekit_ft.plan.fields import parameters_of
from mergekit_ft.plan.fusing import read_fuse
from tests.cards import SECTIONS, section, shown, table
from tests.fused import TASKS, expert, family, model_of, rows
from tests.small_models import cli

NAME = "dynamic_logit_fusion"
Words = dict[str, Any]


@pytest.fixture
def plan(tmp_path: Path) -> Words:
    return family(tmp_path)


def changed(plan: Words, **calibration: Any) -> Words:
    return plan | {"calibration": plan["calibration"] | calibration}


# --- plans ----------------------------------------------------------------------------------------


def test_all_faults_of_a_plan_are_told_at_once() -> None:
    text = (
        "base: ./base\nexprts: {a: ./a}\ncalibration:\n  data: {neutral: n.jsonl}\n"
        "  held_out: 1.5\nfusion:\n  dynamic_logit_fusion: {rigde: 1, high: two}\n"
    )
    with pytest.raises(PlanError) as error:
        read_fuse(text)
    told = "\n".join(f"{fault.line}: {fault.message}" for fault in error.value.faults)
    for said in (
        r"2: unknown key 'exprts'; did you mean 'experts'\?",
        "missing key 'experts'",
        "4: 'neutral' is what the anchor is called",
        "5: held_out must be less than 1",
        r"7: unknown key 'rigde'; did you mean 'ridge'\?",
        "7: high must be a number",
    ):
        assert re.search(said, told), told


def test_a_teacher_is_wanted_or_has_no_effect(plan: Words) -> None:
    with pytest.raises(PlanError, match="needs `teacher:`"):
        read_fuse(plan | {"fusion": {NAME: {"objective": "kl"}}})
    with pytest.raises(PlanError, match="teacher has no effect"):
        read_fuse(plan | {"teacher": "./t"})
    with pytest.raises(PlanError, match="dlf searches a grid"):
        read_fuse(plan | {"fusion": {NAME: {"objective": "dlf", "high": None}}})


def test_the_card_lists_the_parameters() -> None:
    assert re.findall(r"^## (.+)$", registry.card(NAME), re.M) == list(SECTIONS)
    assert len(section(NAME, "What it computes").strip().splitlines()) <= 3
    known = parameters_of(registry.of_kind(NAME, "fusion"))
    listed = {row[0].strip("`"): row[3] for row in table(NAME, "Parameters")}
    assert listed == {word: shown(parameter.default) for word, parameter in known.items()}


def test_the_methods_plan_is_read() -> None:
    found, _ = read_fuse(Path(__file__).parents[1] / "methods" / NAME / "plan.yaml")
    assert list(found.experts) == ["maths", "chat"]


# --- fits -----------------------------------------------------------------------------------------


def test_weights_are_scipys_by_the_models_own_logits(plan: Words, tmp_path: Path) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    words = changed(plan, anchor=False, held_out=0, dtype="float32", positions=1000)
    found = fit(words, tmp_path / "w.json").weights
    models = [model_of(tmp_path / name) for name in ("base", *TASKS)]
    logs: list[list[np.ndarray]] = [[], [], []]
    came: list[int] = []
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    for row in (row for task in TASKS.values() for row in task):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        came += answer
        for model, kept in zip(models, logs, strict=True):
            with torch.no_grad():
                said = model(torch.tensor([prompt + answer])).logits[0].double()
            kept += list(said[len(prompt) - 1 : -1].numpy())
    base, *tuned = (np.stack(kept) for kept in logs)

    def loss(alpha: Any) -> float:
        logits = base + sum(a * (t - base) for a, t in zip(alpha, tuned, strict=True))
        norm = np.log(np.exp(logits).sum(1))
        return float((norm - logits[np.arange(len(came)), came]).mean() + 5e-4 * (alpha**2).sum())

    tight = {"ftol": 1e-15, "gtol": 1e-9}
    theirs = optimize.minimize(loss, [0.5, 0.5], bounds=[(0, 2)] * 2, options=tight)
    assert list(found.alpha.values()) == pytest.approx(theirs.x, abs=1e-4)
    assert found.story["diagnostics"]["all"]["loss"] == pytest.approx(theirs.fun, abs=1e-6)


def test_neither_the_order_of_rows_nor_their_files_matter(plan: Words, tmp_path: Path) -> None:
    first = fit(plan, tmp_path / "a.json").weights
    tagged = [{**row, "domain": name} for name, task in TASKS.items() for row in task]
    path = rows(tmp_path, tagged[::-1], "tagged.jsonl")
    second = fit(changed(plan, data=str(path)), tmp_path / "b.json").weights
    assert first.alpha == second.alpha and first.alpha_by_domain == second.alpha_by_domain
    assert first.story["calibration"] == second.story["calibration"]


def test_domains_count_alike_unless_places_shall(plan: Words, tmp_path: Path) -> None:
    for balanced in (True, False):
        words = changed(plan, balanced=balanced, anchor=False)
        held = fit(words, tmp_path / "w.json", overwrite=True).collection
        sums = [float(held.weights[part.start : part.stop].sum()) for part in held.texts.parts]
        counts = [part.stop - part.start for part in held.texts.parts]
        assert sums == pytest.approx([1.0] * 4 if balanced else counts)


def test_batches_of_another_size_hardly_matter(
    plan: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fit(changed(plan, dtype="float32"), tmp_path / "a.json").weights
    monkeypatch.setattr(recording, "ROWS", 3)
    second = fit(changed(plan, dtype="float32"), tmp_path / "b.json").weights
    assert list(first.alpha.values()) == pytest.approx(list(second.alpha.values()), abs=1e-4)


def test_the_file_says_what_was_done_and_is_read_again(plan: Words, tmp_path: Path) -> None:
    made = fit(plan, tmp_path / "w.json")
    held = read_weights(tmp_path / "w.json")
    assert held == made.weights
    assert held.story["calibration"]["places"]["neutral"]["fitted"] > 0
    assert held.chosen("sums") == held.alpha_by_domain["sums"]
    with pytest.raises(SourceError, match="no weights were fitted for domain 'x'"):
        held.chosen("x")
    for domain in ("sums", "words", "neutral"):
        figures = made.figures[domain]["fitted"]
        assert {"base", "expert sums", "fused", "kl fused"} <= figures.keys()
    every = [made.figures[d]["fitted"] for d in made.figures]
    assert sum(f["fused"] for f in every) < sum(f["base"] for f in every)
    assert not (tmp_path / "w.json.work").exists()


@pytest.mark.parametrize("broken", ["{", '{"kind": "x"}', '{"kind": "logit_fusion"}'])
def test_a_file_that_is_none_of_ours_is_refused(broken: str, tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text(broken)
    with pytest.raises(SourceError, match=r"w\.json"):
        read_weights(tmp_path / "w.json")


def test_a_weight_that_is_not_a_number_is_refused(plan: Words, tmp_path: Path) -> None:
    fit(plan, tmp_path / "w.json")
    words = json.loads((tmp_path / "w.json").read_text())
    words["alpha"]["sums"] = float("nan")
    (tmp_path / "w.json").write_text(json.dumps(words))
    with pytest.raises(SourceError, match="not a finite number"):
        read_weights(tmp_path / "w.json")


def test_an_expert_like_the_base_is_told(plan: Words, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "words")
    shutil.copytree(tmp_path / "base", tmp_path / "words")
    made = fit(plan, tmp_path / "w.json")
    assert made.weights.alpha["words"] == 0.0
    assert any("words does not move the logits" in note for note in made.notes)


def test_another_small_base_and_a_teacher_are_heard(plan: Words, tmp_path: Path) -> None:
    expert(tmp_path / "base", tmp_path / "large", 9, scale=0.05)
    words = plan | {"base": str(tmp_path / "large"), "small": plan["base"]}
    words |= {"teacher": plan["experts"]["sums"], "fusion": {NAME: {"objective": "kl"}}}
    made = fit(words, tmp_path / "w.json")
    assert len(made.collection.files) == 5
    assert made.weights.small is not None
    same = plan | {"teacher": plan["experts"]["sums"], "fusion": {NAME: {"objective": "kl"}}}
    alpha = fit(same, tmp_path / "v.json").weights.alpha
    assert alpha["sums"] > 0.9 and alpha["words"] < 0.1


def test_dlf_needs_no_answers_to_be_right(plan: Words, tmp_path: Path) -> None:
    words = plan | {"fusion": {NAME: {"objective": "dlf"}}}
    made = fit(words, tmp_path / "w.json")
    assert sum(made.weights.story["diagnostics"]["all"]["chosen"]) == pytest.approx(1.0)
    assert all(0 <= a <= 2 for a in made.weights.alpha.values())


# --- what is kept on disk -------------------------------------------------------------------------


def test_as_many_bytes_are_kept_as_announced(plan: Words, tmp_path: Path) -> None:
    made = fit(plan, tmp_path / "w.json", cache=tmp_path / "cache")
    n, vocabulary = made.collection.shape.places, made.collection.shape.vocabulary
    for path in made.collection.files.values():
        kept = load_file(path)
        assert kept["log_probabilities"].shape == (n, vocabulary)
        assert kept["log_probabilities"].dtype == torch.float16
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size == header + n * (2 * vocabulary + 4)
        gap = (
            kept["said"]
            - kept["log_probabilities"].gather(1, made.collection.targets[:, None])[:, 0].float()
        )
        assert float(gap.abs().max()) < 0.01
    assert made.weights.story["calibration"]["rounding"] < 1e-3


def test_a_model_larger_than_memory_is_run_layer_by_layer(plan: Words, tmp_path: Path) -> None:
    words = changed(plan, dtype="float32")
    whole = fit(words, tmp_path / "a.json", cache=tmp_path / "a")
    parts = fit(words, tmp_path / "b.json", cache=tmp_path / "b", memory=1)
    for role, path in whole.collection.files.items():
        one, other = load_file(path), load_file(parts.collection.files[role])
        for name in one:
            assert torch.allclose(one[name], other[name], atol=1e-4), (role, name)
    assert list(parts.weights.alpha.values()) == pytest.approx(
        list(whole.weights.alpha.values()), abs=1e-3
    )


def test_what_is_kept_is_not_asked_for_again(
    plan: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fit(plan, tmp_path / "a.json", cache=tmp_path / "cache")
    assert len(first.collection.seconds) == 3
    again = plan | {"fusion": {NAME: {"ridge": 0.1}}}
    second = fit(again, tmp_path / "b.json", cache=tmp_path / "cache")
    assert not second.collection.seconds
    expert(tmp_path / "base", tmp_path / "words", 77)
    third = fit(plan, tmp_path / "c.json", cache=tmp_path / "cache")
    assert list(third.collection.seconds) == ["expert words"]


def test_a_killed_fit_goes_on_where_it_was(
    plan: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(plan, tmp_path / "whole.json")
    calls: list[int] = []
    asked = recording.said

    def dying(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return asked(*given)

    monkeypatch.setattr(recording, "said", dying)
    with pytest.raises(KeyboardInterrupt):
        fit(plan, tmp_path / "w.json")
    assert not (tmp_path / "w.json").exists()
    fit(plan, tmp_path / "w.json")
    assert (tmp_path / "w.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    total = 3 * len(recording.batches(_samples(plan)))
    assert len(calls) == total + 1


def _samples(plan: Words) -> list[Any]:
    from transformers import AutoTokenizer

    from mergekit_ft.fusion.texts import read_texts

    words, _ = read_fuse(plan)
    texts = read_texts(words.calibration, AutoTokenizer.from_pretrained(plan["base"]))
    return [sample for part in texts.parts for sample in part.samples]


def test_a_full_disk_is_foreseen(
    plan: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(WriteError, match="1 bytes free and the logits of these models take"):
        fit(plan, tmp_path / "w.json")


def test_a_disk_that_fills_up_is_told_and_gone_on_from(
    plan: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = os.pwrite, [0]

    def full(descriptor: int, data: Any, at: int) -> int:
        count[0] += 1
        if count[0] == 20:
            raise OSError(28, "No space left on device")
        return write(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WriteError, match="No space left on device; what is there is kept"):
        fit(plan, tmp_path / "w.json")
    fit(plan, tmp_path / "w.json")
    fit(plan, tmp_path / "v.json")
    assert (tmp_path / "w.json").read_bytes() == (tmp_path / "v.json").read_bytes()


# --- hostile input --------------------------------------------------------------------------------


def test_models_of_different_vocabularies_are_refused(plan: Words, tmp_path: Path) -> None:
    path = tmp_path / "words" / "tokenizer.json"
    words = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = words["model"]["vocab"]
    one, two = list(vocabulary)[65:67]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(words), encoding="utf-8")
    with pytest.raises(SourceError, match="expert words: its vocabulary is not that of base"):
        fit(plan, tmp_path / "w.json")


def test_weights_that_are_not_numbers_are_refused(plan: Words, tmp_path: Path) -> None:
    path = tmp_path / "sums" / "model.safetensors"
    tensors = load_file(path)
    for value, said in ((float("nan"), "norm.weight holds nan"), (3e38, "sums gives logits that")):
        tensors["model.norm.weight"][:] = value
        save_file(tensors, path, {"format": "pt"})
        result = run(plan, tmp_path)
        assert result.exit_code == 5 and re.search(said, result.stderr), result.stderr


def test_a_domain_without_rows_is_refused(plan: Words, tmp_path: Path) -> None:
    (tmp_path / "words.jsonl").write_text("")
    result = run(plan, tmp_path)
    assert result.exit_code == 4 and "no rows" in result.stderr
    rows(tmp_path, TASKS["words"][:1], "words.jsonl")
    with pytest.raises(SourceError, match="1 different rows are too few"):
        fit(plan, tmp_path / "w.json")


def test_rows_without_a_domain_are_refused_where_a_file_is_of_several(
    plan: Words, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="domain"):
        fit(changed(plan, data=str(tmp_path / "sums.jsonl")), tmp_path / "w.json")


def test_an_output_that_is_there_is_kept(plan: Words, tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text("mine")
    with pytest.raises(WriteError, match="exists"):
        fit(plan, tmp_path / "w.json")
    with pytest.raises(WriteError, match=r"ends in \.json"):
        fit(plan, tmp_path / "w")
    assert (tmp_path / "w.json").read_text() == "mine"
    fit(plan, tmp_path / "w.json", overwrite=True)
    assert read_weights(tmp_path / "w.json").alpha


def run(plan: Words, folder: Path, *options: str) -> Any:
    import yaml

    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    return cli("fuse", "fit", str(folder / "plan.yaml"), str(folder / "w.json"), *options)


def test_the_command_tells_weights_and_figures(plan: Words, tmp_path: Path) -> None:
    result = run(plan, tmp_path)
    assert result.exit_code == 0, result.output
    assert re.search(r"weights, all domains: sums \d\.\d{4}, words \d\.\d{4}", result.output)
    assert re.search(r"nats a token, sums, held out: base \d", result.output)
    assert re.search(r"places of 3 models, .* kept, [\d,]+ places/s heard", result.output)
    for _ in range(2):
        again = run(plan, tmp_path, "--overwrite", "--cache", str(tmp_path / "cache"))
    assert again.exit_code == 0 and "heard" not in again.stdout
    told = json.loads(run(plan, tmp_path, "--overwrite", "--json", "--quiet").stdout)
    assert told["kind"] == "logit_fusion" and set(told["alpha"]) == set(TASKS)


def test_the_neutral_text_is_paragraphs() -> None:
    paragraphs = NEUTRAL.read_text(encoding="utf-8").strip().split("\n\n")
    assert len(paragraphs) > 15 and all(len(text) > 80 for text in paragraphs)


def test_a_collection_knows_what_came(plan: Words, tmp_path: Path) -> None:
    made = fit(plan, tmp_path / "w.json", cache=tmp_path / "cache")
    assert isinstance(made.collection, Collection)
    assert len(made.collection.targets) == made.collection.shape.places
    assert made.collection.texts.parts[-1].stop == made.collection.shape.places
