"""A delta on a model gives the model that was meant; taken off, the base's own bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_ft import merge
from mergekit_ft.algebra.indices import gaps
from mergekit_ft.deltas import putting
from mergekit_ft.deltas.putting import apply, revert
from mergekit_ft.deltas.writing import DeltaWriter, Record
from mergekit_ft.errors import SourceError
from mergekit_ft.sources.dtypes import CODE
from tests.checkpoints import write_checkpoint
from tests.small_models import CONFIG, cli, models, weights

__all__ = ["models"]

BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
WORDS: dict[str, Any] = {
    "base": {"id": "org/base", "revision": None},
    "method": "by hand",
    "parameters": {},
    "density": None,
    "seed": None,
    "provenance": {},
}


def sha(tensor: Tensor) -> str:
    flat = tensor.contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def file_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def write_delta(
    path: Path, base: dict[str, Tensor], tuned: dict[str, Tensor], dense: tuple[str, ...] = ()
) -> Path:
    """Write what differs in bits, by the format's definition."""
    records = []
    with DeltaWriter(path) as writer:
        for name, new in tuned.items():
            old = base.get(name)
            if name in dense or old is None or old.shape != new.shape:
                shapes = {"values": tuple(new.shape)}
                writer.append(name, "values", new)
                if old is not None:
                    writer.append(name, "originals", old)
                    shapes["originals"] = tuple(old.shape)
                known = None if old is None else sha(old)
                size, dtype = new.numel(), CODE[new.dtype]
                records.append(
                    Record(name, "dense", dtype, tuple(new.shape), known, size, shapes=shapes)
                )
                continue
            bits = BITS[old.dtype]
            changed = (old.view(-1).view(bits) != new.view(-1).view(bits)).nonzero().flatten()
            if not len(changed):
                continue
            gapped = len(name) % 2 == 0
            writer.append(name, "indices", gaps(changed) if gapped else changed.to(torch.int32))
            writer.append(name, "values", new.view(-1)[changed])
            writer.append(name, "originals", old.view(-1)[changed])
            records.append(
                Record(
                    name,
                    "replace",
                    CODE[old.dtype],
                    tuple(old.shape),
                    sha(old),
                    len(changed),
                    "gap16" if gapped else "int32",
                )
            )
        writer.commit(WORDS, records)
    return path


def touched(base: dict[str, Tensor], dice: np.random.Generator) -> dict[str, Tensor]:
    """Return a model of which random entries hold random bits, NaN's payloads among them."""
    made = {name: tensor.clone() for name, tensor in base.items()}
    share = dice.choice([0.0005, 0.02, 0.7])
    for tensor in made.values():
        bits = tensor.view(-1).view(BITS[tensor.dtype])
        hit = torch.from_numpy(dice.random(len(bits)) < share)
        noise = dice.integers(-(2**15), 2**15, len(bits))
        bits[hit] = torch.from_numpy(noise).to(bits.dtype)[hit]
    first = made["model.embed_tokens.weight"].view(-1)
    first[0] = -0.0
    first[-1] = torch.finfo(first.dtype).smallest_normal / 4
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_hundred_deltas_go_on_and_off_to_the_same_bytes(dtype: torch.dtype) -> None:
    base = weights(0, dtype=dtype, width=24)
    write_checkpoint(Path("hundred"), base, config=CONFIG)
    before = file_hash(Path("hundred"))
    for seed in range(34):
        tuned = touched(base, np.random.default_rng(seed))
        write_delta(Path(f"d{seed}.safetensors"), base, tuned)
        options = {"allow_non_finite": True, "overwrite": True}
        apply("hundred", f"d{seed}.safetensors", "on", **options)
        made = load_file("on/model.safetensors")
        assert all(sha(made[name]) == sha(tuned[name]) for name in tuned)
        revert("on", f"d{seed}.safetensors", "off", **options)
        assert file_hash(Path("off")) == before


def dense_delta() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    base = load_file("base/model.safetensors")
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["lm_head.weight"] += 1
    tuned["model.norm.weight"][3] = 7
    tuned["extra.weight"] = torch.arange(4.0)
    write_delta(Path("d.safetensors"), base, tuned, dense=("lm_head.weight",))
    return base, tuned


def test_whole_tensors_and_new_ones_go_on_and_off() -> None:
    _, tuned = dense_delta()
    before = load_file("base/model.safetensors")
    apply("base", "d.safetensors", "on")
    made = load_file("on/model.safetensors")
    assert made.keys() == tuned.keys()
    assert all(torch.equal(made[name], tuned[name]) for name in tuned)
    revert("on", "d.safetensors", "off")
    back = load_file("off/model.safetensors")
    assert back.keys() == before.keys()
    assert all(torch.equal(back[name], before[name]) for name in before)


def test_the_side_files_and_the_layout_of_the_base_stay() -> None:
    write_checkpoint(Path("two"), weights(0), shards=2, config=CONFIG)
    Path("two/notes.txt").write_text("mine")
    base = weights(0)
    tuned = {name: tensor * 1.5 for name, tensor in base.items()}
    write_delta(Path("d.safetensors"), base, tuned)
    apply("two", "d.safetensors", "on")
    shards = sorted(path.name for path in Path("on").glob("*.safetensors"))
    assert shards == sorted(path.name for path in Path("two").glob("*.safetensors"))
    assert Path("on/notes.txt").read_text() == "mine"
    assert cli("verify", "on", "--sample", "99").exit_code == 0


def test_another_base_is_refused_before_anything_is_left() -> None:
    base = load_file("base/model.safetensors")
    tuned = {name: tensor + 1 for name, tensor in base.items()}
    write_delta(Path("d.safetensors"), base, tuned)
    with pytest.raises(SourceError, match=r"has SHA-256 .* made for .*, of org/base: put it on"):
        apply("maths", "d.safetensors", "on")
    with pytest.raises(SourceError, match="the delta was not put on this model"):
        revert("maths", "d.safetensors", "off")
    with pytest.raises(SourceError, match="the delta was not put on this model"):
        revert("base", "d.safetensors", "off")
    assert not any(Path(name).exists() for name in ("on", "on.part", "off", "off.part"))


def test_a_model_changed_beyond_its_delta_is_not_reverted() -> None:
    _, _ = dense_delta()
    apply("base", "d.safetensors", "on")
    held = load_file("on/model.safetensors")
    held["lm_head.weight"][0, 0] += 1
    save_file(held, "on/model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"lm_head.weight would not be what it was"):
        revert("on", "d.safetensors", "off")


def additive(path: Path, name: str, base: Tensor, scale: float = 1.0) -> Path:
    """Write a sparse addition and a product of rank 1."""
    with DeltaWriter(path) as writer:
        writer.append(name, "indices", torch.tensor([1, 9], dtype=torch.int32))
        writer.append(name, "values", torch.tensor([0.25, -3.0]))
        other = "model.layers.0.self_attn.q_proj.weight"
        writer.append(other, "a", torch.ones(1, 8))
        writer.append(other, "b", torch.full((8, 1), 0.5))
        q = load_file("base/model.safetensors")[other]
        writer.commit(
            WORDS,
            [
                Record(name, "add", "F32", tuple(base.shape), sha(base), 2, "int32"),
                Record(
                    other,
                    "low_rank",
                    "F32",
                    (8, 8),
                    sha(q),
                    64,
                    scale=2.0,
                    shapes={"a": (1, 8), "b": (8, 1)},
                ),
            ],
        )
    return path


def test_what_is_added_can_be_scaled_and_cannot_be_taken_off() -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    base = load_file("base/model.safetensors")
    additive(Path("d.safetensors"), name, base[name])
    apply("base", "d.safetensors", "on", scale=2.0)
    made = load_file("on/model.safetensors")
    wanted = base[name].clone()
    wanted.view(-1)[1] += 0.5
    wanted.view(-1)[9] -= 6.0
    assert torch.equal(made[name], wanted)
    q = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(made[q], base[q] + 2.0)
    with pytest.raises(SourceError, match="cannot be taken off exactly"):
        revert("on", "d.safetensors", "off")


def test_a_replacement_cannot_be_scaled() -> None:
    dense_delta()
    with pytest.raises(SourceError, match="cannot be scaled"):
        apply("base", "d.safetensors", "on", scale=0.5)


def plan(delta: str = "d.safetensors", more: str = "") -> str:
    return (
        "merge_method: task_arithmetic\nbase_model: ./base\nmodels:\n"
        f"  - {{model: ./base, delta: {delta}{more}, parameters: {{weight: 0.5}}}}\n"
    )


def test_a_delta_in_a_plan_is_the_model_that_it_makes() -> None:
    base = load_file("base/model.safetensors")
    tuned = load_file("maths/model.safetensors")
    write_delta(Path("d.safetensors"), base, tuned)
    assert cli("merge", "-", "one", text=plan()).exit_code == 0
    text = plan().replace("./base, delta: d.safetensors", "./maths")
    assert cli("merge", "-", "other", text=text).exit_code == 0
    assert file_hash(Path("one")) == file_hash(Path("other"))
    receipt = json.loads(Path("one/mergekit_ft.lock.json").read_text())
    assert any("delta/d.safetensors" in source["files"] for source in receipt["sources"])
    assert cli("verify", "one").exit_code == 0
    write_delta(Path("e.safetensors"), base, {k: t + 1 for k, t in base.items()})
    Path("e.safetensors").replace("d.safetensors")  # another delta at the same path
    assert cli("verify", "one").exit_code == 1


def test_a_delta_stands_wherever_a_model_does() -> None:
    base = load_file("base/model.safetensors")
    write_delta(Path("d.safetensors"), base, load_file("maths/model.safetensors"))
    words = {
        "merge_method": "linear",
        "models": [
            {"model": {"path": "./base", "delta": {"path": "d.safetensors"}}},
            {"model": "./chat"},
        ],
        "parameters": {"weight": 0.5},
    }
    merge(words, "one")
    words["models"][0] = {"model": "./maths"}
    merge(words, "other")
    assert file_hash(Path("one")) == file_hash(Path("other"))
    based = {
        "merge_method": "task_arithmetic",
        "base_model": {"model": "./base", "delta": "d.safetensors"},
        "models": [{"model": "./chat", "parameters": {"weight": 1.0}}],
    }
    merge(based, "third")
    assert torch.equal(
        load_file("third/model.safetensors")["lm_head.weight"],
        load_file("chat/model.safetensors")["lm_head.weight"],
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (plan("nowhere.safetensors"), "nowhere.safetensors: cannot be read"),
        (plan("base/model.safetensors"), "is no delta file"),
        (plan("3"), "3: cannot be read"),
        (plan("[a]"), "plan:4:21: a delta is a file's PATH, or {path, scale}"),
        (plan("{path: d, scael: 2}"), "unknown key 'scael' in a model; did you mean 'scale'?"),
        (plan("{path: d, scale: x}"), "scale must be a number"),
        (plan("{path: d, scale: 2, revert: true}"), "scale has no effect with revert"),
        (plan(more=", adapter: x"), "an adapter or a delta, not both"),
    ],
)
def test_faulty_words_are_told_with_their_place(text: str, told: str) -> None:
    dense_delta()
    result = cli("check", "-", text=text)
    assert result.exit_code in (3, 4)
    assert told in result.stderr
    assert "plan:4:" in result.stderr


def test_names_that_the_model_has_not_are_told_with_the_nearest() -> None:
    base = {"model.norm.wieght": torch.ones(8)}
    write_delta(Path("d.safetensors"), base, {"model.norm.wieght": torch.zeros(8)})
    with pytest.raises(SourceError, match=r"nearest: model\.norm\.weight"):
        apply("base", "d.safetensors", "on")


def test_another_shape_is_told() -> None:
    base = {"model.norm.weight": torch.ones(9)}
    write_delta(Path("d.safetensors"), base, {"model.norm.weight": torch.zeros(9)})
    with pytest.raises(SourceError, match=r"is F32 \[8\] in base, and the delta is for F32 \[9\]"):
        apply("base", "d.safetensors", "on")


def test_added_rows_change_the_configs_vocabulary() -> None:
    base = load_file("base/model.safetensors")
    write_checkpoint(Path("base"), base, config=CONFIG | {"vocab_size": 16})
    tuned = {name: t.clone() for name, t in base.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tuned[name] = torch.cat([base[name], torch.ones(2, 8)])
    write_delta(Path("d.safetensors"), base, tuned)
    apply("base", "d.safetensors", "on")
    assert json.loads(Path("on/config.json").read_text())["vocab_size"] == 18
    revert("on", "d.safetensors", "off")
    assert json.loads(Path("off/config.json").read_text())["vocab_size"] == 16
    assert file_hash(Path("off")) == file_hash(Path("base"))


@pytest.mark.parametrize(
    "indices", [[4, 1], [1, 1], [1, 200]], ids=["backwards", "twice", "beyond the end"]
)
def test_indices_that_cannot_be_are_told(indices: list[int]) -> None:
    base = load_file("base/model.safetensors")["model.embed_tokens.weight"]
    with DeltaWriter(Path("d.safetensors")) as writer:
        writer.append("model.embed_tokens.weight", "indices", torch.tensor(indices).int())
        for part in ("values", "originals"):
            writer.append("model.embed_tokens.weight", part, torch.ones(2))
        record = Record(
            "model.embed_tokens.weight", "replace", "F32", (16, 8), sha(base), 2, "int32"
        )
        writer.commit(WORDS, [record])
    for command in (
        ("delta", "info", "d.safetensors"),
        ("delta", "apply", "base", "d.safetensors", "on"),
    ):
        result = cli(*command)
        assert result.exit_code == 4
        assert "the file is damaged" in result.stderr
    assert not Path("on").exists()


def test_a_truncated_delta_is_told() -> None:
    dense_delta()
    data = Path("d.safetensors").read_bytes()
    Path("d.safetensors").write_bytes(data[:-5])
    result = cli("delta", "apply", "base", "d.safetensors", "on")
    assert result.exit_code == 4 and "truncated" in result.stderr


def test_a_run_that_dies_leaves_what_resume_finishes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tuned = dense_delta()
    real = putting.merge

    def dying(*args: Any, **options: Any) -> Any:
        from mergekit_ft import engine

        with monkeypatch.context() as patch:
            patch.setattr(engine, "_surround", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            return real(*args, **options)

    monkeypatch.setattr(putting, "merge", dying)
    with pytest.raises(KeyboardInterrupt):
        apply("base", "d.safetensors", "on")
    assert not Path("on").exists() and Path("on.part").exists()
    monkeypatch.setattr(putting, "merge", real)
    apply("base", "d.safetensors", "on", resume=True)
    made = load_file("on/model.safetensors")
    assert all(torch.equal(made[name], tuned[name]) for name in tuned)


def test_info_says_what_the_file_alone_tells() -> None:
    base = load_file("base/model.safetensors")
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["model.norm.weight"][:3] += torch.tensor([3.0, 4.0, 12.0])
    write_delta(Path("d.safetensors"), base, tuned)
    result = cli("delta", "info", "d.safetensors", "--json")
    report = json.loads(result.stdout)
    (tensor,) = report["tensors"]
    assert (tensor["entries"], tensor["share"]) == (3, 3 / 8)
    assert tensor["norm"] == pytest.approx(13.0, rel=1e-6)
    assert report["norm"] == pytest.approx(13.0, rel=1e-6)
    assert (report["dense_bytes"], report["exact"]) == (32, True)
    text = cli("delta", "info", "d.safetensors").stdout
    assert "by hand of org/base" in text and "can be taken off exactly" in text


def test_small_budgets_and_threads_move_no_bit() -> None:
    base = weights(5, width=512, layers=1)
    write_checkpoint(Path("wide"), base, config=CONFIG | {"num_hidden_layers": 1})
    tuned = touched(base, np.random.default_rng(1))
    write_delta(Path("d.safetensors"), base, tuned)
    found = set()
    for memory, threads in ((1 << 30, 2), (24 << 20, 1), (64 << 20, 3)):
        options = {"memory": memory, "threads": threads, "allow_non_finite": True}
        apply("wide", "d.safetensors", "on", overwrite=True, **options)
        found.add(file_hash(Path("on")))
    assert len(found) == 1
