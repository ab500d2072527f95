"""What models disagree on besides their weights: noted, and an error under --strict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import write_checkpoint
from tests.small_models import CONFIG, arithmetic, cli, merged, no_reading, weights
from tests.small_models import write_models as write
from tests.vocabularies import words, write_model

pytestmark = pytest.mark.usefixtures("here")

PLAN = arithmetic()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    return tmp_path


def say(model: str, file: str, **words: Any) -> None:
    """Set words of a model's JSON file."""
    path = Path(model, file)
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(held | words))


def strictly(command: str, *more: str) -> list[str]:
    found = cli(command, "-", *more, "--strict", text=PLAN)
    assert found.exit_code == 4, found.output
    return [line for line in found.stderr.splitlines() if line.startswith("strict: ")]


def test_models_that_agree_pass_strictly() -> None:
    merged(PLAN, "out", "--strict")


def test_every_conflict_is_a_note_and_all_are_errors_under_strict(monkeypatch: Any) -> None:
    say("maths", "config.json", rope_theta=1e6, rms_norm_eps=1e-5, vocab_size=16)
    say("base", "config.json", rms_norm_eps=1e-6, vocab_size=17)
    wanted = ["rope_theta: 10000.0 in ./base, 1000000.0 in ./maths"]
    wanted += ["rms_norm_eps: 1e-06 in ./base, 1e-05 in ./maths"]
    wanted += ["vocab_size: 17 in ./base, 16 in ./maths"]
    notes = merged(PLAN, "out").stdout
    assert all(f"note: {line}" in notes for line in wanted)
    no_reading(monkeypatch)
    for found in (strictly("check"), strictly("merge", "again")):
        assert sorted(found) == sorted(f"strict: {line}" for line in wanted)
    assert not Path("again").exists() and not Path("again.part").exists()


def test_special_tokens_that_disagree_are_told() -> None:
    say("base", "tokenizer_config.json", eos_token="</s>", pad_token=None)
    say("maths", "tokenizer_config.json", eos_token={"content": "<|im_end|>"}, pad_token="<pad>")
    assert 'note: eos_token: "</s>" in ./base, "<|im_end|>" in ./maths' in merged(PLAN).stdout
    assert len(strictly("check")) == 1


def test_an_end_of_text_outside_the_vocabulary_is_told() -> None:
    say("base", "config.json", vocab_size=16)
    say("maths", "config.json", vocab_size=16)
    say("base", "generation_config.json", eos_token_id=[2, 128009])
    assert "eos_token_id: 128009 in generation_config.json of ./base" in merged(PLAN).stdout
    assert "no text would end" in strictly("check")[0]


def test_a_tensor_that_nothing_uses_is_an_error_under_strict() -> None:
    extra = weights(1, **{"extra.weight": torch.ones(2)})
    write_checkpoint(Path("maths"), extra, config=CONFIG)
    merged(PLAN)
    assert strictly("check") == ["strict: ./maths: not used: extra.weight"]


def test_a_part_is_compared_with_the_config_of_that_part() -> None:
    text = {"model_type": "llama", "rope_theta": 10000.0, "vocab_size": 16}
    Path("base/config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    Path("maths/config.json").write_text(json.dumps({**text, "rope_theta": 1e6}))
    assert strictly("check") == ["strict: rope_theta: 10000.0 in ./base, 1000000.0 in ./maths"]


def test_a_side_file_that_is_not_json_disagrees_with_nothing() -> None:
    Path("base/tokenizer_config.json").write_text("{")
    say("maths", "tokenizer_config.json", eos_token="x")
    refused_nothing = cli("check", "-", "--strict", text=PLAN)
    assert refused_nothing.exit_code == 0, refused_nothing.output


def test_the_same_plan_gives_the_same_config_whatever_the_hash_seed() -> None:
    say("maths", "config.json", rope_theta=1e6)
    plan = "merge_method: linear\nmodels:\n"
    plan += "".join(f"- {{model: ./{m}, parameters: {{weight: 1}}}}\n" for m in ("maths", "chat"))
    merged(plan)
    assert json.loads(Path("out/config.json").read_text())["rope_theta"] == 1e6


def test_tokens_at_other_ids_are_told_and_an_error_under_strict() -> None:
    for seed, name in enumerate(("base", "maths")):
        write_model(Path(name), seed, words("x", *(("cat", "dog") if seed else ("dog", "cat"))))
    assert "2 tokens ('dog', 'cat') of ./base not at the same id" in merged(PLAN).stdout
    assert "rows are merged by number" in strictly("check")[0]
