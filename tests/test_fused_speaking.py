"""Models that speak as one: with caches, tokens of other numbers, shots, and in transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_ft.data.rows import Row
from mergekit_ft.errors import PlanError, SourceError
from mergekit_ft.fusion import Fixed, FusedSpeaker, Searched, fused_models, generate
from mergekit_ft.fusion.processing import FusionProcessor
from mergekit_ft.fusion.translating import translation
from mergekit_ft.models.opening import open_speaker
from mergekit_ft.plan import ModelReference
from mergekit_ft.plan.fused import read_fused
from tests.fused import TASKS, expert, model_of, rows
from tests.small_models import cli
from tests.tuned import small_base

PROMPTS = ("1+2=", "say one", "3+3=", "a")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a larger model, and of a small one with two experts."""
    folder = tmp_path_factory.mktemp("fused")
    large = small_base(folder / "large")
    expert(large, folder / "base", 7, scale=0.1)
    small = small_base(folder / "small")
    for seed, name in enumerate(TASKS):
        expert(small, folder / name, seed, scale=0.15)
    return folder


def words(folder: Path, **more: Any) -> dict[str, Any]:
    """Return a plan of them."""
    experts = {name: str(folder / name) for name in TASKS}
    return {
        "base": str(folder / "base"),
        "small": str(folder / "small"),
        "experts": experts,
        **more,
    }


def said(folder: Path, name: str, text: str) -> Tensor:
    """Return a model's logits of what follows a text, asked of transformers without a cache."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / name)
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits: Tensor = model_of(folder / name)(input_ids=tokens).logits[0, -1]
    return logits.double()


def written(folder: Path, prompt: str, alpha: Mapping[str, float], count: int) -> str:
    """Return what fused models say, by a loop that reads everything anew for every token."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "base")
    loaded = {name: model_of(folder / name) for name in ("base", "small", *alpha)}
    tokens = tokenizer(prompt)["input_ids"]
    start = len(tokens)
    for _ in range(count):
        with torch.no_grad():
            given = torch.tensor([tokens])
            last = {k: m(input_ids=given).logits[0, -1].double() for k, m in loaded.items()}
        logits = last["base"] + sum(a * (last[k] - last["small"]) for k, a in alpha.items())
        tokens.append(int(logits.argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            return str(tokenizer.decode(tokens[start:-1], skip_special_tokens=True))
    return str(tokenizer.decode(tokens[start:], skip_special_tokens=True))


def test_what_is_fused_is_the_formula(models: Path) -> None:
    alpha = {"sums": 0.7, "words": 0.4}
    speaker = fused_models(words(models, alpha=alpha)).open()
    tokens = torch.tensor([speaker.tokenizer("1+2=")["input_ids"]])
    found = speaker.read(tokens, torch.ones_like(tokens))[0, -1].double().exp()
    base, small = said(models, "base", "1+2="), said(models, "small", "1+2=")
    moves = [a * (said(models, name, "1+2=") - small) for name, a in alpha.items()]
    wanted = torch.softmax(base + sum(moves), -1)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6)


def test_prompts_of_a_batch_are_answered_as_a_loop_without_caches_answers_each(
    models: Path,
) -> None:
    alpha = {"sums": 0.9, "words": 0.5}
    found = list(
        generate(fused_models(words(models, alpha=alpha)), PROMPTS, rows="raw", max_new_tokens=8)
    )
    assert [one.prompt for one in found] == list(PROMPTS)
    for one in found:
        assert one.answer.text == written(models, one.prompt, alpha, 8)
        assert len(one.factors) == len(one.answer.tokens)
        assert all(moved == alpha for moved in one.factors)


def test_an_expert_of_the_base_itself_speaks_for_itself(models: Path) -> None:
    plan = {"base": str(models / "small"), "experts": {"sums": str(models / "sums")}}
    found = list(generate(fused_models(plan), PROMPTS, rows="raw", max_new_tokens=6))
    for one in found:
        assert one.answer.text == _alone(models / "sums", one.prompt, 6)
        assert all(abs(moved["sums"] - 1) < 1e-6 for moved in one.factors)


def _alone(model: Path, prompt: str, count: int) -> str:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    given = tokenizer(prompt, return_tensors="pt")
    tokens = model_of(model).generate(
        **given, max_new_tokens=count, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    made = tokens[0, given["input_ids"].shape[1] :]
    return str(tokenizer.decode(made, skip_special_tokens=True))


def test_the_search_moves_one_expert_at_a_token_and_does_not_depend_on_the_batch(
    models: Path,
) -> None:
    plan = fused_models(words(models))
    together = list(generate(plan, PROMPTS, rows="raw", max_new_tokens=6))
    alone = [
        made for p in PROMPTS for made in generate(plan, [p], rows="raw", max_new_tokens=6, batch=1)
    ]
    assert [one.answer for one in together] == [one.answer for one in alone]
    moved = [factors for one in together for factors in one.factors]
    assert all(len(factors) <= 1 for factors in moved)
    assert all(0 <= a <= 2 for factors in moved for a in factors.values())
    assert {name for factors in moved for name in factors} == set(TASKS)


def test_models_of_other_dtypes_speak_together(models: Path) -> None:
    mixed = words(models, dtypes={"base": "bfloat16", "sums": "float16"})
    speaker = fused_models(mixed).open()
    kinds = {str(next(s.model.parameters()).dtype) for s in speaker.speakers}  # type: ignore[attr-defined]
    assert kinds == {"torch.bfloat16", "torch.float16", "torch.float32"}
    tokens = torch.tensor([speaker.tokenizer("1+2=")["input_ids"]])
    near = fused_models(words(models)).open().read(tokens, torch.ones_like(tokens))
    assert (speaker.read(tokens, torch.ones_like(tokens)) - near).abs().max() < 0.1


# ---- tokens of other numbers


def renumbered(folder: Path, out: Path) -> Path:
    """Write a model again, each of its tokens under another number."""
    from transformers import AutoTokenizer

    model, tokenizer = model_of(folder), AutoTokenizer.from_pretrained(folder)
    count = len(tokenizer)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3))  # new -> old
    place = {int(old): new for new, old in enumerate(order)}
    with torch.no_grad():
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            part.weight.copy_(part.weight[order].clone())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    file = out / "tokenizer.json"
    text = json.loads(file.read_text())
    text["model"]["vocab"] = {t: place[i] for t, i in text["model"]["vocab"].items()}
    for added in text["added_tokens"]:
        added["id"] = place[added["id"]]
    file.write_text(json.dumps(text))
    return out


def test_small_models_that_number_tokens_otherwise_say_the_same(
    models: Path, tmp_path: Path
) -> None:
    wanted = list(generate(fused_models(words(models)), PROMPTS, rows="raw", max_new_tokens=6))
    other = {name: str(renumbered(models / name, tmp_path / name)) for name in ("small", *TASKS)}
    plan = words(models, small=other.pop("small"), experts=other)
    found = list(generate(fused_models(plan), PROMPTS, rows="raw", max_new_tokens=6))
    assert [one.answer for one in found] == [one.answer for one in wanted]


def test_tokens_without_a_counterpart_are_refused_unless_they_are_named() -> None:
    base, other = {"a": 0, "b": 1, "<e>": 2}, {"b": 0, "a": 1, "</s>": 2}
    with pytest.raises(SourceError, match=r"small: 1 of 3 tokens of base.*'<e>'.*`tokens:`"):
        translation("small", base, other)
    found = translation("small", base, other, {"<e>": "</s>"})
    assert found is not None
    assert found.tolist() == [1, 0, 2]
    assert translation("small", base, dict(base)) is None
    with pytest.raises(SourceError, match="'<x>' is no token of base"):
        translation("small", base, other, {"<x>": "</s>"})
    with pytest.raises(SourceError, match="'<s>' is no token of small"):
        translation("small", base, other, {"<e>": "<s>"})
    with pytest.raises(SourceError, match="two tokens of base would be one"):
        translation("small", base, other, {"<e>": "a"})


# ---- shots


def test_shots_are_seen_by_all_or_by_the_base_alone(models: Path) -> None:
    shots = [Row("here:1", "completion", {"prompt": "1+1=", "completion": "2"}, 1.0)]
    plan = fused_models(words(models, alpha={"sums": 0.8, "words": 0.3}))
    long = "1+1=2\n\n3+1="
    (whole,) = generate(plan, [long], rows="raw", max_new_tokens=5)
    (shown,) = generate(plan, ["3+1="], rows="raw", max_new_tokens=5, shots=shots)
    assert shown.answer == whole.answer
    (first,) = generate(
        plan, ["3+1="], rows="raw", max_new_tokens=1, shots=shots, shown="base", batch=1
    )
    moves = [
        a * (said(models, n, "3+1=") - said(models, "small", "3+1="))
        for n, a in (("sums", 0.8), ("words", 0.3))
    ]
    assert first.answer.tokens[0] == int((said(models, "base", long) + sum(moves)).argmax())


# ---- in transformers


@pytest.mark.parametrize("beams", [1, 3])
def test_the_processor_moves_generate_as_the_speaker_does(models: Path, beams: int) -> None:
    parts = {
        name: open_speaker(ModelReference(model=str(models / name)))
        for name in ("base", "small", *TASKS)
    }
    experts = {name: parts[name] for name in TASKS}
    tokenizer = parts["base"].tokenizer
    tokenizer.padding_side = "left"
    given = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    given.pop("token_type_ids", None)

    def made(processor: Any) -> Tensor:
        out: Tensor = parts["base"].model.generate(  # type: ignore[operator]
            **given,
            max_new_tokens=6,
            do_sample=False,
            num_beams=beams,
            pad_token_id=tokenizer.pad_token_id,
            logits_processor=[processor],
        )
        return out

    class Forgetful(FusionProcessor):
        """One that reads everything anew."""

        def _order(self, tokens: Tensor) -> None:
            return None

    more: dict[str, Any] = {"small": parts["small"], "pad": tokenizer.pad_token_id}
    found = made(FusionProcessor(experts, Searched(), **more))
    assert torch.equal(found, made(Forgetful(experts, Searched(), **more)))
    if beams == 1:
        plan = fused_models(words(models))
        spoken = list(generate(plan, PROMPTS, rows="raw", max_new_tokens=6))
        texts = tokenizer.batch_decode(
            found[:, given["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert texts == [one.answer.text for one in spoken]


# ---- from weak to strong


def test_what_a_small_model_learned_makes_a_larger_one_better(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    small = small_base(tmp_path / "small")
    tokenizer: Any = AutoTokenizer.from_pretrained(small)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")
    task = [f"say {w}:{w[::-1]}" for w in ("one", "two", "six", "ten", "red", "sun", "map", "cup")]
    texts = [torch.tensor([tokenizer(text)["input_ids"]]) for text in task]
    model: Any = model_of(small).train()
    adam = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(25):
        loss = sum(model(input_ids=t, labels=t).loss for t in texts)
        adam.zero_grad()
        loss.backward()
        adam.step()
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    plan = {
        "base": str(tmp_path / "large"),
        "small": str(small),
        "experts": {"task": str(tmp_path / "tuned")},
    }
    fused, alone = fused_models(plan).open(), open_speaker(ModelReference(model=plan["base"]))  # type: ignore[arg-type]

    def nats(speaker: Any) -> float:
        found = [
            torch.nn.functional.cross_entropy(
                speaker.read(t, torch.ones_like(t))[0, :-1].float(), t[0, 1:]
            )
            for t in texts
        ]
        return float(sum(found)) / len(found)

    assert nats(fused) < 0.6 * nats(alone)


# ---- words


def test_all_that_is_wrong_with_a_plan_is_told_at_once() -> None:
    plan = {
        "base": "a",
        "small": "b",
        "experts": {"maths": "c"},
        "alpha": {"mats": 1.0},
        "search": {"bounds": {"maths": [0, 2]}},
        "dtypes": {"larg": "bfloat16"},
    }
    with pytest.raises(PlanError) as told:
        read_fused(plan)
    said = str(told.value)
    assert "search has no effect" in said
    assert "'mats' is none of the models; did you mean" in said
    assert "alpha says no factor of 'maths'" in said
    assert "'larg' is none of the models" in said
    with pytest.raises(PlanError, match="0 <= low < high"):
        read_fused({"base": "a", "experts": {"m": "c"}, "search": {"bounds": [1, 0]}})


def test_factors_and_devices_that_are_none_are_refused_in_their_places() -> None:
    text = "\n".join(
        (
            "base: a",
            "experts: {m: c, n: d}",
            "alpha: {m: .nan, n: -.inf}",
            "devices: {m: gpu}",
            "dtypes: {n: int8}",
        )
    )
    with pytest.raises(PlanError) as told:
        read_fused(text)
    places = {(fault.line, fault.column) for fault in told.value.faults}
    assert {(3, 12), (3, 21), (4, 14), (5, 13)} <= places
    assert str(told.value).count("must be finite") == 2
    assert "no device is called 'gpu'" in str(told.value)


def test_an_expert_may_be_called_as_the_base_is(models: Path) -> None:
    first, second = TASKS
    plain = words(models, alpha={first: 1.0, second: 0.5})
    named = {"base": plain["experts"][first], "small": plain["experts"][second]}
    same = {**plain, "experts": named, "alpha": {"base": 1.0, "small": 0.5}}
    answers = [
        [a.answer.text for a in generate(fused_models(plan), PROMPTS, rows="raw", max_new_tokens=4)]
        for plan in (plain, same)
    ]
    assert answers[0] == answers[1]
    with pytest.raises(PlanError, match="'base' is an expert and base itself"):
        read_fused({**same, "dtypes": {"base": "bfloat16"}})


def test_the_command_answers_and_tells_what_moved_each_token(models: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(json.dumps(words(models)), encoding="utf-8")
    more = ("--rows", "raw", "--max-new-tokens", "4")
    done = cli("fuse", "generate", str(plan), "--prompt", "1+2=", *more, "--json", "--factors")
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)
    assert found["prompt"] == "1+2="
    assert len(found["factors"]) == found["tokens"]
    file = rows(tmp_path, [{"prompt": "1+2="}, {"prompt": "a"}], "prompts.jsonl")
    done = cli("fuse", "generate", str(plan), str(file), *more, "--factors")
    assert done.exit_code == 0, done.output
    assert "> 1+2=" in done.stdout
    assert "factors: " in done.stdout
    assert cli("fuse", "generate", str(plan), *more).exit_code == 2
    for idle in (("--seed", "1"), ("--shots-for", "base")):
        assert cli("fuse", "generate", str(plan), "--prompt", "a", *idle).exit_code == 2
    refused = cli("fuse", "generate", str(plan), "--prompt", "a", "--domain", "sums")
    assert "a plan has no weights by domain" in refused.stderr


def test_fused_models_are_measured_as_one(models: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(json.dumps(words(models, alpha={"sums": 0.5, "words": 0.5})), encoding="utf-8")
    data = rows(tmp_path, [{"text": "1+2=3"}], "texts.jsonl")
    done = cli("eval", str(plan), str(models / "base"), str(data), "--json", "--quiet")
    assert done.exit_code == 0, done.output
    speaker = fused_models(str(plan)).open()
    tokens = torch.tensor([[*speaker.tokenizer("1+2=3")["input_ids"]]])
    end = speaker.tokenizer.eos_token_id
    tokens = torch.cat([tokens, torch.tensor([[end]])], dim=1)
    parts = {
        n: model_of(models / n)(input_ids=tokens).logits[0].detach().double()
        for n in ("base", "small", *TASKS)
    }
    logits = parts["base"] + 0.5 * sum(parts[n] - parts["small"] for n in TASKS)
    wanted = float(torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:]))
    (result,) = [r for r in json.loads(done.stdout)["results"] if r["model"] == str(plan)]
    assert result["measures"]["loss"]["value"] == pytest.approx(wanted, abs=1e-5)


def test_weights_that_were_fitted_serve_decoding(models: Path, tmp_path: Path) -> None:
    from mergekit_ft.fusion.weights import Weights, write_weights

    experts = {name: ModelReference(model=str(models / name)) for name in TASKS}
    weights = Weights(
        ModelReference(model=str(models / "base")),
        ModelReference(model=str(models / "small")),
        experts,
        {"sums": 0.9, "words": 0.5},
        {"sums": {"sums": 1.1, "words": 0.0}},
    )
    file = tmp_path / "weights.json"
    write_weights(weights, file)
    (one,) = generate(fused_models(file), ["1+2="], rows="raw", max_new_tokens=4)
    assert all(moved == {"sums": 0.9, "words": 0.5} for moved in one.factors)
    (one,) = generate(fused_models(file, domain="sums"), ["1+2="], rows="raw", max_new_tokens=4)
    assert all(moved == {"sums": 1.1} for moved in one.factors)
    found = fused_models(file, searched=True)
    assert isinstance(found.rule, Searched)
    assert isinstance(fused_models(file).rule, Fixed)
    assert isinstance(found.open(), FusedSpeaker)
