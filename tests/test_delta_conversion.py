"""Deltas come from other tools and go to them with the same values, or are refused by name."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_ft.deltas.convert import convert
from mergekit_ft.deltas.extract import extract
from mergekit_ft.deltas.putting import apply, revert
from mergekit_ft.errors import PlanError, SourceError, WriteError
from mergekit_ft.sources.delta_file import open_delta
from tests.checkpoints import tiny_gpt2, tiny_llama, write_checkpoint
from tests.small_models import CONFIG, models

__all__ = ["models"]

SHAPES = {
    "model.norm.weight": (7,),
    "model.up.weight": (5, 7),
    "model.experts.gate_up": (3, 4, 5),
    "model.conv.weight": (2, 3, 4, 2),
}
AT: Any = {"of": "composable-sft", "to": "delta"}


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=dice).to(dtype) for name, shape in SHAPES.items()}


def authors_file(folder: Path, dense: dict[str, Tensor], **whole: Tensor) -> Path:
    """Write what composable-sft writes of dense differences: the first axis runs fastest."""
    diffs = {}
    for name, tensor in dense.items():
        column_major = tensor.numpy().flatten(order="F")
        flat = np.flatnonzero(column_major)
        steps: list[Any] = np.diff(flat, prepend=0).tolist()
        steps[0] = np.int64(steps[0])
        values = torch.from_numpy(column_major[flat])
        diffs[name] = {"size": tensor.shape, "index_steps": steps, "values": values}
    folder.mkdir(parents=True)
    torch.save({"diffs": diffs, "abs": whole}, folder / "pytorch_diff.bin")
    return folder


def decoded(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    """Read such a file by the arithmetic of the format: coordinate = index // stride % length."""
    held = torch.load(folder / "pytorch_diff.bin", weights_only=False)
    found = {}
    for name, encoded in held["diffs"].items():
        size, made = list(encoded["size"]), np.zeros(encoded["size"], np.float32)
        assert type(encoded["index_steps"][0]) is np.int64
        assert {type(step) for step in encoded["index_steps"][1:]} <= {int}
        index = 0
        for step, value in zip(encoded["index_steps"], encoded["values"].tolist(), strict=True):
            index += int(step)
            made[tuple(index // int(np.prod(size[:d])) % size[d] for d in range(len(size)))] = value
        found[name] = made
    return found, held["abs"]


def sparse(seed: int, share: float = 0.2) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return {n: t * (torch.rand(t.shape, generator=dice) < share) for n, t in drawn(seed).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_composable_sft_comes_in_with_its_values_in_one_to_four_dimensions(
    dtype: torch.dtype,
) -> None:
    base, moved, head = drawn(0, dtype), sparse(1), torch.randn(3, 7)
    write_checkpoint(Path("b"), base, config=CONFIG)
    authors_file(Path("sft"), moved, **{"classifier.weight": head})
    report = convert("sft", "d.safetensors", base="b", **AT)
    assert report.entries == sum(int((t != 0).sum()) for t in moved.values()) + head.numel()
    assert report.whole == 1
    apply("b", "d.safetensors", "on")
    made = load_file("on/model.safetensors")
    for name, tensor in base.items():
        assert torch.equal(made[name], (tensor.float() + moved[name]).to(dtype))  # rounded once
    assert torch.equal(made["classifier.weight"], head)


def test_composable_sft_goes_out_and_comes_back_to_the_same_values() -> None:
    write_checkpoint(Path("b"), drawn(0), config=CONFIG)
    moved, head = sparse(1), torch.randn(3, 7)
    authors_file(Path("sft"), moved, **{"classifier.weight": head})
    convert("sft", "d.safetensors", base="b", **AT)
    convert("d.safetensors", "out", of="delta", to="composable-sft")
    found, whole = decoded(Path("out"))
    assert found.keys() == moved.keys()
    for name, tensor in moved.items():
        assert np.array_equal(found[name], tensor.numpy())
    assert torch.equal(whole["classifier.weight"], head)
    convert("out", "again.safetensors", base="b", **AT)
    one, other = load_file("d.safetensors"), load_file("again.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_replaces_is_rounded_once_and_comes_off_to_the_bit() -> None:
    base, moved = drawn(0, torch.bfloat16), sparse(1)
    write_checkpoint(Path("b"), base, config=CONFIG)
    authors_file(Path("sft"), moved)
    convert("sft", "d.safetensors", base="b", exact=True, **AT)
    apply("b", "d.safetensors", "on")
    made = load_file("on/model.safetensors")
    for name, tensor in base.items():
        assert torch.equal(made[name], (tensor.float() + moved[name]).to(torch.bfloat16))
    revert("on", "d.safetensors", "off")
    assert Path("off/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()


def test_an_extracted_delta_goes_to_composable_sft_as_differences() -> None:
    base, moved = drawn(0, torch.bfloat16), sparse(1)
    tuned = {n: (t.float() + moved[n]).to(torch.bfloat16) for n, t in base.items()}
    tuned["model.up.weight"][2] *= 2.0**-30  # their differences to the base are no float32
    write_checkpoint(Path("b"), base, config=CONFIG)
    write_checkpoint(Path("t"), tuned, config=CONFIG)
    extract("b", "t", "d.safetensors")
    report = convert("d.safetensors", "out", of="delta", to="composable-sft", base="b")
    found, _ = decoded(Path("out"))
    wrong = 0
    for name, difference in found.items():
        again = (base[name].float() + torch.from_numpy(difference)).bfloat16()
        wrong += int((again != tuned[name]).sum())
    told = next((note for note in report.notes if "last places" in note), "0 ")
    assert int(told.split()[0]) == wrong > 0


def test_a_prefix_that_the_base_lacks_is_found_and_told() -> None:
    base, moved = drawn(0), sparse(1)
    bare = {name.removeprefix("model."): tensor for name, tensor in base.items()}
    write_checkpoint(Path("b"), bare)
    authors_file(Path("sft"), moved)
    report = convert("sft", "d.safetensors", base="b", **AT)
    assert "model.up.weight is up.weight in b" in report.notes
    assert open_delta(Path("d.safetensors")).changes.keys() == bare.keys()
    write_checkpoint(Path("other"), {"embed.weight": torch.randn(5, 7)})
    with pytest.raises(SourceError, match=r"4 of the 4 tensors.*are not in other.*prefix"):
        convert("sft", "e.safetensors", base="other", **AT)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch exploded",)


def test_nothing_that_a_pickle_names_is_run() -> None:
    allowed = set(torch.serialization.get_safe_globals())
    write_checkpoint(Path("b"), drawn(0), config=CONFIG)
    authors_file(Path("sft"), sparse(1))
    convert("sft", "good.safetensors", base="b", **AT)
    Path("bad").mkdir()
    torch.save({"diffs": {}, "abs": {"x": Bomb()}}, "bad/pytorch_diff.bin")
    with pytest.raises(SourceError, match="none of it was run"):
        convert("bad", "d.safetensors", base="b", **AT)
    assert not Path("exploded").exists()
    assert set(torch.serialization.get_safe_globals()) == allowed  # as before


def spoiled(**changes: Any) -> None:
    name = "model.up.weight"
    good = {"size": (5, 7), "index_steps": [np.int64(3), 2], "values": torch.ones(2)}
    Path("sft").mkdir(exist_ok=True)
    torch.save({"diffs": {name: {**good, **changes}}, "abs": {}}, "sft/pytorch_diff.bin")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index_steps": [np.int64(3), 32]}, "outside"),
        ({"index_steps": [np.int64(3), -4]}, "outside"),
        ({"index_steps": [np.int64(3), 0]}, "twice"),
        ({"index_steps": [np.int64(3), 1.5]}, "no whole numbers"),
        ({"index_steps": [np.int64(3)]}, "not as many values"),
        ({"index_steps": [2**62, 2**62]}, "outside"),
        ({"values": torch.tensor([1.0, float("nan")])}, "NaN"),
        ({"values": torch.tensor([1, 2])}, "not added"),
        ({"size": (7, 5)}, r"\[7, 5\]"),
        ({"size": (5, -7)}, "whole numbers"),
        ({"values": torch.zeros(2)}, "changes nothing"),
    ],
)
def test_damage_is_told_by_name_and_leaves_nothing(changes: Any, message: str) -> None:
    write_checkpoint(Path("b"), drawn(0), config=CONFIG)
    spoiled(**changes)
    with pytest.raises(SourceError, match=message):
        convert("sft", "d.safetensors", base="b", **AT)
    assert not list(Path().glob("d.safetensors*"))


def tuned_llama(**options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write ./llama and ./tuned, of which a tenth of the entries of linear layers differ."""
    tiny_llama(Path("llama"), **options)
    base = load_file("llama/model.safetensors")
    dice = torch.Generator().manual_seed(5)
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for name, tensor in tuned.items():
        if "_proj" in name:
            tensor += torch.randn(tensor.shape, generator=dice).where(
                torch.rand(tensor.shape, generator=dice) < 0.1, torch.zeros(())
            )
    write_checkpoint(Path("tuned"), tuned)
    (Path("tuned") / "config.json").write_text((Path("llama") / "config.json").read_text())
    return base, tuned


@torch.no_grad()
def test_a_shira_adapter_loads_in_peft_with_the_logits_of_the_changed_model() -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tuned_llama()
    extract("llama", "tuned", "d.safetensors")
    report = convert("d.safetensors", "shira", of="delta", to="shira", base="llama")
    assert any("zeros" in note for note in report.notes)
    tokens = torch.arange(12).view(1, -1)
    plain = AutoModelForCausalLM.from_pretrained("llama").eval()
    before = plain(tokens).logits
    found = PeftModel.from_pretrained(plain, "shira").eval()(tokens).logits
    apply("llama", "d.safetensors", "on")
    meant = AutoModelForCausalLM.from_pretrained("on").eval()(tokens).logits
    assert not torch.allclose(before, meant)
    assert float((found - meant).abs().max()) <= 1e-6

    held = load_file("shira/adapter_model.safetensors")
    rank = report_rank("shira")
    entries = {}
    for name, values in held.items():
        if name.endswith("shira_weight"):
            module = name.removesuffix(".shira_weight").removeprefix("base_model.model.")
            rows, columns = plain.get_submodule(module).base_layer.weight.shape
            assert values.shape == (rank * (rows + columns),)
            entries[rows + columns] = max(entries.get(rows + columns, 0), int((values != 0).sum()))
    assert any((rank - 1) * size < count for size, count in entries.items())  # no smaller r


def report_rank(folder: str) -> int:
    return int(json.loads((Path(folder) / "adapter_config.json").read_text())["r"])


def test_a_shira_adapter_comes_back_without_its_zeros() -> None:
    base, tuned = tuned_llama()
    extract("llama", "tuned", "d.safetensors")
    convert("d.safetensors", "shira", of="delta", to="shira", base="llama")
    report = convert("shira", "e.safetensors", of="shira", to="delta", base="llama")
    assert report.entries == sum(int((tuned[n] != base[n]).sum()) for n in base)
    apply("llama", "e.safetensors", "on")
    made = load_file("on/model.safetensors")
    held = load_file("shira/adapter_model.safetensors")
    for name, tensor in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.shira_"
        if f"{key}weight" in held:
            rows, columns = held[f"{key}indices"].long()
            tensor[rows, columns] += held[f"{key}weight"]
        assert torch.equal(made[name], tensor)


@torch.no_grad()
def test_a_shira_adapter_that_peft_saved_comes_in() -> None:
    from peft import ShiraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, _ = tuned_llama()
    config = ShiraConfig(r=2, target_modules=["q_proj"], random_seed=1, init_weights=False)
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained("llama"), config)
    wrapped.save_pretrained("adapter")
    convert("adapter", "d.safetensors", of="shira", to="delta", base="llama")
    apply("llama", "d.safetensors", "on")
    merged = wrapped.merge_and_unload().state_dict()
    made = load_file("on/model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(made[name], base[name])
    assert all(torch.equal(made[name], merged[name]) for name in base)


def test_what_shira_cannot_hold_is_refused_by_name() -> None:
    _, tuned = tuned_llama()
    tuned["model.norm.weight"] += 1
    tuned["model.embed_tokens.weight"][3] += 1
    save_file(tuned, "tuned/model.safetensors", metadata={"format": "pt"})
    extract("llama", "tuned", "d.safetensors")
    with pytest.raises(SourceError, match=r"embed_tokens.*model\.norm\.weight: is no linear"):
        convert("d.safetensors", "shira", of="delta", to="shira", base="llama")
    assert not list(Path().glob("shira*"))
    tiny_gpt2(Path("gpt2"))
    held = load_file("gpt2/model.safetensors")
    name = next(name for name in held if name.endswith("attn.c_attn.weight"))
    held[name][0, 0] += 1
    write_checkpoint(Path("gpt2-tuned"), held)
    extract("gpt2", "gpt2-tuned", "g.safetensors")
    with pytest.raises(SourceError, match=r"c_attn\.weight: is no linear"):
        convert("g.safetensors", "shira", of="delta", to="shira", base="gpt2")


def test_a_layer_that_changes_too_densely_is_refused_by_name() -> None:
    _, tuned = tuned_llama()
    tuned["model.layers.1.mlp.up_proj.weight"][:-6] += 1
    save_file(tuned, "tuned/model.safetensors", metadata={"format": "pt"})
    extract("llama", "tuned", "d.safetensors", density=0.2)
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        convert("d.safetensors", "shira", of="delta", to="shira", base="llama")


def sara_file(
    path: str, threshold: float, trained: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """Write ./llama and SaRA's file of it; return the model as it was trained, in float32."""
    from transformers import AutoModelForCausalLM

    tiny_llama(Path("llama"), **options)
    model = AutoModelForCausalLM.from_pretrained("llama", dtype=trained)
    saved: dict[Any, Any] = {"threshold": threshold}
    made = {}
    with torch.no_grad():
        for number, (name, theta) in enumerate(model.named_parameters()):
            mask = theta.abs() < threshold
            theta[mask] += torch.randn(int(mask.sum())).to(trained) * 0.01
            saved[number] = theta[mask]
            made[name] = theta.detach().clone()
    torch.save(saved, path)
    return made


SARA: Any = {"of": "sara", "to": "delta"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("stored", "trained"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_saras_file_is_placed_by_the_base_and_the_models_own_order(
    stored: torch.dtype, trained: torch.dtype, tied: bool
) -> None:
    made = sara_file("s.pt", 0.005, trained, dtype=stored, tie_word_embeddings=tied)
    convert("s.pt", "d.safetensors", base="llama", **SARA)
    apply("llama", "d.safetensors", "on")
    found = load_file("on/model.safetensors")
    assert found.keys() == made.keys()
    for name, tensor in made.items():
        assert torch.equal(found[name], tensor.to(stored)), name
    revert("on", "d.safetensors", "off")
    off, base = (Path(p) / "model.safetensors" for p in ("off", "llama"))
    assert off.read_bytes() == base.read_bytes()


def test_saras_file_for_another_model_names_the_first_tensor_that_does_not_fit() -> None:
    sara_file("s.pt", 0.005, torch.float32)
    tiny_llama(Path("other"), seed=9)
    with pytest.raises(SourceError, match=r"values for model\.embed_tokens\.weight, of which"):
        convert("s.pt", "d.safetensors", base="other", **SARA)
    tiny_llama(Path("longer"), layers=3)
    with pytest.raises(SourceError, match=r"21 parameters.*has 30"):
        convert("s.pt", "d.safetensors", base="longer", **SARA)


def test_where_no_model_can_be_built_the_order_is_given() -> None:
    base = {"b.weight": torch.linspace(-1, 1, 12).view(3, 4), "a.bias": torch.tensor([0.0, 2.0])}
    write_checkpoint(Path("b"), base)
    torch.save({0: torch.tensor([9.0, 8.0]), 1: torch.tensor([7.0])}, "s.pt")
    with pytest.raises(SourceError, match="--threshold"):
        convert("s.pt", "d.safetensors", base="b", **SARA)
    with pytest.raises(SourceError, match="--order"):
        convert("s.pt", "d.safetensors", base="b", threshold=0.1, **SARA)
    Path("names.txt").write_text("b.weight\na.bias\n")
    convert("s.pt", "d.safetensors", base="b", threshold=0.1, order="names.txt", **SARA)
    apply("b", "d.safetensors", "on")
    made = load_file("on/model.safetensors")
    assert made["b.weight"].flatten()[5:7].tolist() == [9.0, 8.0]  # -1/11 and 1/11
    assert made["a.bias"].tolist() == [7.0, 2.0]


def test_words_without_effect_are_refused() -> None:
    with pytest.raises(PlanError, match="--threshold"):
        convert("d", "e", of="delta", to="composable-sft", threshold=0.1)
    with pytest.raises(PlanError, match="--exact"):
        convert("d", "e", of="sara", to="delta", base="b", exact=True)


def test_a_head_that_the_base_has_tied_is_no_embedding() -> None:
    tiny_llama(Path("b"), tie_word_embeddings=True)
    embedding = load_file("b/model.safetensors")["model.embed_tokens.weight"]
    name = "model.layers.0.self_attn.q_proj.weight"
    authors_file(
        Path("sft"), {name: torch.eye(16)}, **{"lm_head.weight": torch.zeros_like(embedding)}
    )
    with pytest.raises(SourceError, match=r"lm_head\.weight.*tied to model\.embed_tokens"):
        convert("sft", "d.safetensors", base="b", **AT)


def test_a_whole_tensor_takes_the_dtype_of_the_bases_and_must_have_its_shape() -> None:
    write_checkpoint(Path("b"), drawn(0, torch.bfloat16), config=CONFIG)
    norm = torch.full((7,), 1.3)
    moved = {"model.up.weight": sparse(1)["model.up.weight"]}
    authors_file(Path("sft"), moved, **{"model.norm.weight": norm})
    convert("sft", "d.safetensors", base="b", **AT)
    apply("b", "d.safetensors", "on")
    assert torch.equal(load_file("on/model.safetensors")["model.norm.weight"], norm.bfloat16())
    authors_file(Path("other"), moved, **{"model.norm.weight": torch.ones(9)})
    with pytest.raises(SourceError, match=r"\[9\].*\[7\]"):
        convert("other", "e.safetensors", base="b", **AT)


def test_a_file_that_numpy_1_wrote_is_read() -> None:
    write_checkpoint(Path("b"), drawn(0), config=CONFIG)
    file = authors_file(Path("sft"), sparse(1)) / "pytorch_diff.bin"
    with zipfile.ZipFile(file) as old:
        parts = [(item, old.read(item)) for item in old.infolist()]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as new:
        for item, data in parts:
            new.writestr(item, data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert convert("sft", "d.safetensors", base="b", **AT).tensors == 4


def test_another_base_is_refused_and_a_folder_is_not_overwritten_unasked() -> None:
    write_checkpoint(Path("b"), drawn(0), config=CONFIG)
    write_checkpoint(Path("c"), drawn(3), config=CONFIG)
    authors_file(Path("sft"), sparse(1))
    convert("sft", "d.safetensors", base="b", **AT)
    with pytest.raises(SourceError, match="SHA-256"):
        convert("d.safetensors", "out", of="delta", to="composable-sft", base="c")
    assert not list(Path().glob("out*"))
    with pytest.raises(WriteError, match="--overwrite"):
        convert("d.safetensors", "sft", of="delta", to="composable-sft")
