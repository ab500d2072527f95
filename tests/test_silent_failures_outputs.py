"""Each way in which a merge was seen to lie, refused or told: what lies in the output."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from tests.checkpoints import write_checkpoint
from tests.small_models import (
    CONFIG,
    arithmetic,
    cli,
    hashes,
    merged,
    process,
    refused,
    same_bytes,
    tensors,
    three,
    weights,
    write_models,
)
from tests.small_models import (
    models as models,
)


def test_the_first_model_gives_config_and_bytes_whatever_the_hash_seed() -> None:
    for name, theta in (("maths", 1e6), ("chat", 1e4)):
        config = json.dumps({**CONFIG, "rope_theta": theta, "tie_word_embeddings": theta < 1e5})
        Path(name, "config.json").write_text(config)
    Path("plan.yaml").write_text(three("linear", "weight: 0.5").replace("base_model: ./base\n", ""))
    for seed in ("1", "2"):
        ran = process("merge", "plan.yaml", f"out{seed}/same", PYTHONHASHSEED=seed)
        assert ran.returncode == 0, ran.stderr
        assert "rope_theta: 1000000.0 in ./maths, 10000.0 in ./chat" in ran.stdout
    assert Path("out1/same/config.json").read_bytes() == Path("maths/config.json").read_bytes()
    assert hashes("out1/same") == hashes("out2/same")


@pytest.mark.parametrize("tied", ["maths", "chat"])
def test_a_head_that_only_one_model_ties_is_refused_or_told(tied: str) -> None:
    Path(tied, "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))
    text = three("linear", "weight: 0.5").replace("base_model: ./base\n", "")
    if tied == "maths":  # the donor: its head is its embedding, so another's would be lost
        refused(4, "./chat has a lm_head.weight of its own, which ./maths ties", text)
        return
    said = "tie_word_embeddings: false in ./maths, true in ./chat"
    assert said in merged(text).stdout
    assert "lm_head.weight" in tensors()


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_random_dropping_is_the_same_in_every_run_without_a_seed(method: str) -> None:
    for out in ("a", "b"):
        merged(three(method, "weight: 0.5, density: 0.5"), out)
    assert len(same_bytes(tensors("a"), tensors("b"))) == 12


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_another_density_for_one_tensor_changes_no_other(method: str) -> None:
    embedding = "model.embed_tokens.weight"
    density = f"[{{value: 0.2, match: {embedding}}}, {{value: 0.5}}]"
    merged(three(method, "weight: 0.5, density: 0.5"), "a")
    merged(three(method, f"weight: 0.5, density: {density}"), "b")
    assert same_bytes(tensors("a"), tensors("b")) == set(weights(0)) - {embedding}


def test_merging_again_in_other_shards_leaves_no_stale_file() -> None:
    merged(arithmetic(), "out", "--max-shard-size", "1KB")
    assert len(list(Path("out").glob("*.safetensors"))) > 2
    merged(arithmetic(weight="0.25"), "out", "--overwrite")
    merged(arithmetic(weight="0.25"), "fresh")
    assert {path.name for path in Path("out").iterdir()} == {
        "README.md",
        "config.json",
        "mergekit_config.yml",
        "mergekit_ft.lock.json",
        "model.safetensors",
    }
    assert len(same_bytes(tensors("out"), tensors("fresh"))) == 12


def test_a_folder_that_holds_something_is_refused_and_left_alone() -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("years")
    refused(6, "out is not empty; name another folder, or give --overwrite", arithmetic())
    assert Path("out/thesis.tex").read_text() == "years"


def test_a_model_of_the_plan_is_never_overwritten(models: Path) -> None:
    before = hashes(models / "base")
    for out in ("base", "./maths", str(models), "base/out"):
        refused(6, "which the plan reads; name another folder", arithmetic(), out, "--overwrite")
    assert hashes("base") == before


@pytest.mark.parametrize("out", [".", "..", "base/.."])
def test_a_folder_without_a_name_of_its_own_is_refused(out: str) -> None:
    refused(6, "name", arithmetic(), out, "--overwrite")
    assert Path("base/model.safetensors").exists()


SLOWED = """
import sys, time
from mergekit_ft.writer import Writer
write = Writer.write
Writer.write = lambda *given: (time.sleep(0.2), write(*given))[1]
from mergekit_ft.cli import main
main(["merge", "plan.yaml", "out", "--threads", "1"])
"""


def test_a_run_that_is_killed_leaves_no_output() -> None:
    Path("plan.yaml").write_text(arithmetic())
    run = subprocess.Popen([sys.executable, "-c", SLOWED], stderr=subprocess.DEVNULL)
    part = Path("out.part/model.safetensors")
    while not part.exists() and run.poll() is None:
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert not Path("out").exists() and part.exists()
    refused_with_part = "is what a stopped run left; --resume finishes it"
    assert refused_with_part in process("merge", "plan.yaml", "out").stderr
    for out in ("out", "undisturbed"):
        assert cli("merge", "plan.yaml", out, "--resume").exit_code == 0
    assert same_bytes(tensors("out"), tensors("undisturbed")) == set(weights(0))


class Usage(NamedTuple):
    total: int = 1 << 40
    used: int = 1 << 40
    free: int = 4096


def test_a_full_disk_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage())
    assert "has 4,096 bytes free and the output takes" in refused(6, "make room", arithmetic())


def test_models_in_bfloat16_stay_in_bfloat16_and_the_config_says_so(models: Path) -> None:
    write_models(models, dtype=torch.bfloat16)
    for name in ("base", "maths", "chat"):
        text = json.dumps({**CONFIG, "torch_dtype": "bfloat16"})
        Path(name, "config.json").write_text(text)
    merged(three("ties", "weight: 0.5, density: 0.5"))
    assert {t.dtype for t in tensors().values()} == {torch.bfloat16}
    assert json.loads(Path("out/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_the_dtype_that_is_asked_for_is_stored_and_the_config_says_so(key: str) -> None:
    for name in ("base", "maths"):
        Path(name, "config.json").write_text(json.dumps({**CONFIG, "dtype": "float32"}))
    merged(arithmetic(more=f"{key}: float16\n"))
    assert {t.dtype for t in tensors().values()} == {torch.float16}
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "float16"


def test_tensors_that_are_stored_otherwise_in_a_model_are_told() -> None:
    write_checkpoint(Path("half"), weights(1, dtype=torch.bfloat16), config=CONFIG)
    result = merged(arithmetic("./half"))
    assert "stored as BF16, F32 in ./base; the output is F32" in result.stdout


SIDES = {
    "generation_config.json": b'{ "eos_token_id" : [1, 2] }',
    "chat_template.jinja": b"{{ messages }}\r\n",
    "LICENSE": b"all rights\n",
    "tokenizer.json": '{"model": "é"}'.encode(),
    "tokenizer_config.json": b"{}",
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens":true}',
    "journal.jsonl": b'{"a diary": true}\n',
    "notes.txt": b"",
}


def test_every_side_file_of_the_base_comes_along_byte_for_byte() -> None:
    for name, content in SIDES.items():
        Path("base", name).parent.mkdir(exist_ok=True)
        Path("base", name).write_bytes(content)
    merged(arithmetic())
    lock = json.loads(Path("out/mergekit_ft.lock.json").read_text())
    for name, content in SIDES.items():
        assert Path("out", name).read_bytes() == content
        assert lock["outputs"][name]["size"] == len(content)
    assert Path("out/config.json").read_bytes() == Path("base/config.json").read_bytes()


def test_the_receipt_names_every_file_but_itself() -> None:
    Path("base/modeling_x.py").write_text("layers = 3\n")
    merged(arithmetic(), "out", "--max-shard-size", "1KB", "--copy-code")
    lock = json.loads(Path("out/mergekit_ft.lock.json").read_text())
    there = hashes("out")
    del there["mergekit_ft.lock.json"]
    assert {name: file["sha256"] for name, file in lock["outputs"].items()} == there


def test_custom_code_is_named_and_stays_behind_unless_asked_for() -> None:
    Path("base/modeling_x.py").write_text("layers = 3\n")
    said = "./base: custom code is not copied (modeling_x.py)"
    assert said in merged(arithmetic()).stdout
    assert not Path("out/modeling_x.py").exists()
    assert said not in merged(arithmetic(), "with", "--copy-code").stdout
    assert Path("with/modeling_x.py").read_text() == "layers = 3\n"


def test_other_weights_beside_the_model_are_named_and_stay_behind() -> None:
    Path("base/adapter_model.safetensors").write_bytes(b"")
    said = "./base: other weight files stay behind (adapter_model.safetensors)"
    assert said in merged(arithmetic()).stdout


def test_the_card_of_the_base_is_kept_apart_and_ours_carries_its_licence() -> None:
    card = b"---\nlicense: apache-2.0\ntags: [x]\n---\n# Base\n"
    Path("base/README.md").write_bytes(card)
    plan = b"merge_method: of the base\r\n"
    Path("base/mergekit_config.yml").write_bytes(plan)
    merged(arithmetic())
    assert Path("out/README.base.md").read_bytes() == card
    assert Path("out/mergekit_config.base.yml").read_bytes() == plan
    front = yaml.safe_load(Path("out/README.md").read_text().split("---\n")[1])
    expected: dict[str, Any] = {
        "license": "apache-2.0",
        "library_name": "transformers",
        "tags": ["merge", "mergekit-ft"],
    }
    assert front == expected


def test_the_same_merge_has_the_same_files_whatever_the_folders_name() -> None:
    for out in ("one", "other"):
        Path("plan.yaml").write_bytes(arithmetic().replace("\n", "\r\n").encode())
        assert cli("merge", "plan.yaml", out).exit_code == 0
    assert hashes("one") == hashes("other")
    assert Path("one/mergekit_config.yml").read_bytes() == Path("plan.yaml").read_bytes()
