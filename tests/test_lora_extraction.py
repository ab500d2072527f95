"""An extracted adapter is the best of its rank, loads in peft, and says itself how good it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_ft.algebra import spectra
from mergekit_ft.cli import main
from mergekit_ft.sources import adapted, open_adapter, open_source
from tests.checkpoints import (
    save,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen2,
    tiny_t5,
    write_checkpoint,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft, on what it loads
RANK, F32 = 3, torch.float32


def tuned(base: Path, out: Path, chosen: Callable[[str], bool], seed: int = 5) -> Path:
    """Write a copy of a checkpoint in which the chosen tensors have noise added."""
    shutil.copytree(base, out)
    weights = load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in weights.items():
        if chosen(name):
            noise = 0.05 * torch.randn(tensor.shape, generator=generator)
            weights[name] = (tensor + noise).to(tensor.dtype)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def run(*words: Any, fails: int = 0) -> Any:
    result = CliRunner().invoke(main, ["lora", *map(str, words)])
    assert result.exit_code == fails, result.output + result.stderr
    if fails:
        assert not result.stdout
        return result.stderr
    return json.loads(result.stdout)


def extract(base: Path, other: Path, out: Path, *words: Any) -> Any:
    return run("extract", base, other, out, "--json", "--quiet", *words)


def best(change: Tensor, rank: int) -> Tensor:
    """Return the nearest matrix of a rank, by numpy's SVD in float64."""
    u, s, v = np.linalg.svd(change.double().numpy(), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ v[:rank])


def wanted(base: Path, other: Path, report: Any) -> dict[str, Tensor]:
    """Return the weights that the adapter must give: the base's where nothing is said of them."""
    weights, moved = load_file(base / "model.safetensors"), load_file(other / "model.safetensors")
    out = {name: tensor.double() for name, tensor in weights.items()}
    for matrix in report["matrices"]:
        name = matrix["tensor"]
        out[name] = out[name] + best(moved[name].double() - out[name], matrix["rank"])
    factored = {matrix["tensor"] for matrix in report["matrices"]}
    for name in set(out) - factored - set(report["left_out"]):
        out[name] = moved[name].double()
    return out


def by_peft(base: Path, adapter: Path) -> Any:
    """Return the model that peft and transformers make of the two."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    masked = AutoConfig.from_pretrained(base).model_type == "bert"
    kind = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model: Any = kind.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter)


MODELS = [
    (tiny_llama, lambda name: "proj" in name, 14, 0),
    (tiny_llama, lambda name: True, 15, 6),
    (tiny_llama, lambda name: "layers.1.self_attn" in name or name == "lm_head.weight", 5, 0),
    (tiny_qwen2, lambda name: True, 14, 7),
    (tiny_gpt2, lambda name: not name.endswith("attn.bias"), 8, 8),
    (tiny_gpt2, lambda name: "c_proj" in name, 4, 0),
    (tiny_bert, lambda name: "decoder" not in name, 13, 10),
]


@pytest.mark.parametrize(("make", "chosen", "matrices", "saved"), MODELS)
def test_an_adapter_loads_in_peft_and_gives_the_best_of_its_rank(
    tmp_path: Path, make: Any, chosen: Any, matrices: int, saved: int
) -> None:
    base = make(tmp_path / "base")
    other = tuned(base, tmp_path / "tuned", chosen)
    report = extract(base, other, tmp_path / "out", "--rank", RANK)
    assert len(report["matrices"]) == matrices
    assert len(report["saved_modules"]) == saved
    target = wanted(base, other, report)
    made = by_peft(base, tmp_path / "out").merge_and_unload().state_dict()
    for name, tensor in target.items():
        assert float((made[name] - tensor).abs().max()) < 1e-5, name
    mine = adapted(open_source(str(base)), open_adapter(str(tmp_path / "out")))
    for name, tensor in target.items():
        if name in mine:
            assert float((mine.tensor(name) - tensor).abs().max()) < 1e-5, name


def test_names_without_the_models_stem_get_it_back(tmp_path: Path) -> None:
    whole = tiny_gpt2(tmp_path / "whole")  # GPT-2 on the hub has "h.0..." for "transformer.h.0..."
    stem = len("transformer.")
    weights = {name[stem:]: t for name, t in load_file(whole / "model.safetensors").items()}
    words = json.loads((whole / "config.json").read_text())
    base = write_checkpoint(tmp_path / "base", weights, config=words)
    other = tuned(base, tmp_path / "tuned", lambda name: "mlp" in name)
    report = extract(base, other, tmp_path / "out", "--rank", RANK)
    assert len(report["saved_biases"]) == 4
    made = by_peft(base, tmp_path / "out").merge_and_unload().state_dict()
    for name, tensor in wanted(base, other, report).items():
        assert float((made[f"transformer.{name}"] - tensor).abs().max()) < 1e-5, name


def test_without_a_config_names_tell_what_is_a_linear_layer_and_the_report_says_so(
    tmp_path: Path,
) -> None:
    base = tiny_llama(tmp_path / "base")
    (base / "config.json").unlink()
    other = tuned(base, tmp_path / "tuned", lambda name: True)
    report = extract(base, other, tmp_path / "out", "--rank", RANK)
    assert len(report["matrices"]) == 15 and len(report["saved_modules"]) == 6
    assert "told by their names: it has no config.json" in report["notes"][0]


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_gpt2, tiny_bert])
def test_the_logits_in_peft_are_those_of_the_best_weights(tmp_path: Path, make: Any) -> None:
    base = make(tmp_path / "base")
    other = tuned(base, tmp_path / "tuned", lambda name: not name.endswith("attn.bias"))
    report = extract(base, other, tmp_path / "out", "--rank", RANK)
    model = by_peft(base, tmp_path / "out").eval()
    plain: Any = type(model.get_base_model()).from_pretrained(base, dtype=torch.float32).eval()
    target = {name: tensor.float() for name, tensor in wanted(base, other, report).items()}
    plain.load_state_dict(target, strict=False)
    tokens = torch.arange(1, 12)[None]
    with torch.no_grad():
        difference = model(input_ids=tokens).logits - plain(input_ids=tokens).logits
    assert float(difference.abs().max()) < 1e-5


def test_the_energy_reported_is_that_of_the_files(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    other = tuned(base, tmp_path / "tuned", lambda name: "proj" in name)
    report = extract(base, other, tmp_path / "out", "--rank", RANK)
    files = load_file(tmp_path / "out/adapter_model.safetensors")
    before, after = load_file(base / "model.safetensors"), load_file(other / "model.safetensors")
    missed = total = 0.0
    for matrix in report["matrices"]:
        change = (after[matrix["tensor"]].double() - before[matrix["tensor"]].double()).numpy()
        stem = f"base_model.model.{matrix['module']}.lora_"
        a, b = (files[f"{stem}{side}.weight"].double().numpy() for side in "AB")
        rest = float(((change - b @ a) ** 2).sum())
        assert matrix["energy"] == pytest.approx(1 - rest / (change**2).sum(), abs=1e-12)
        assert matrix["residual"] == pytest.approx((rest / (change**2).sum()) ** 0.5, rel=1e-9)
        missed, total = missed + rest, total + float((change**2).sum())
    assert report["totals"]["energy"] == pytest.approx(1 - missed / total, abs=1e-12)
    assert len(report["matrices"]) == 14


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_an_energy_gives_each_matrix_the_least_rank_that_keeps_it(
    tmp_path: Path, energy: float
) -> None:
    base = tiny_llama(tmp_path / "base")
    other = tuned(base, tmp_path / "tuned", lambda name: "proj" in name)
    report = extract(base, other, tmp_path / "out", "--energy", energy)
    before, after = load_file(base / "model.safetensors"), load_file(other / "model.safetensors")
    for matrix in report["matrices"]:
        name = matrix["tensor"]
        squares = np.linalg.svd((after[name].double() - before[name].double()).numpy())[1] ** 2
        shares = np.cumsum(squares) / squares.sum()
        least = int(np.argmax(shares >= energy - 1e-12)) + 1
        assert matrix["rank"] == least
        assert matrix["energy"] >= energy - 1e-9
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    ranks = {matrix["module"]: matrix["rank"] for matrix in report["matrices"]}
    assert {**dict.fromkeys(ranks, config["r"]), **config["rank_pattern"]} == ranks
    assert config["lora_alpha"] == config["r"]
    assert config["alpha_pattern"] == config["rank_pattern"]
    made = by_peft(base, tmp_path / "out").merge_and_unload().state_dict()
    for name, tensor in wanted(base, other, report).items():
        assert float((made[name] - tensor).abs().max()) < 1e-5


def test_experts_that_the_model_stacks_are_refused_only_where_they_changed(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    small = {"num_hidden_layers": 1, "num_local_experts": 2, "vocab_size": 96, "hidden_size": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    base = save(MixtralForCausalLM(MixtralConfig(**small, **heads)), tmp_path / "base", F32, 1)
    other = tuned(base, tmp_path / "tuned", lambda name: True)
    told = run("extract", base, other, tmp_path / "out", "--rank", 2, "--quiet", fails=4)
    assert "block_sparse_moe" in told and "(7 of 16 are such)" in told
    report = extract(base, other, tmp_path / "out", "--rank", 2, "--others", "skip")
    assert sum("block_sparse_moe" in name for name in report["left_out"]) == 7
    attention = tuned(base, tmp_path / "attention", lambda name: "self_attn" in name)
    report = extract(base, attention, tmp_path / "attended", "--rank", RANK)
    made = by_peft(base, tmp_path / "attended").merge_and_unload().state_dict()
    for name, tensor in wanted(base, attention, report).items():
        if "block_sparse_moe" not in name:
            assert float((made[name] - tensor).abs().max()) < 1e-5, name


def test_a_change_of_low_rank_comes_back_whole(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    torch.manual_seed(1)
    weights[name] = weights[name] + torch.randn(32, 2) @ torch.randn(2, 16)
    other = write_checkpoint(tmp_path / "tuned", weights)
    report = extract(base, other, tmp_path / "out", "--rank", 2)
    (matrix,) = report["matrices"]
    assert matrix["module"] == "model.layers.1.mlp.up_proj"
    assert matrix["energy"] > 1 - 1e-12 and report["unchanged"] == len(weights) - 1
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.mlp.up_proj"]  # not that of layer 0


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_a_sketch_is_nearly_as_good_as_the_whole_spectrum(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(
        torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False
    )
    squares = torch.logspace(0, -2, 60, dtype=torch.float64)
    matrix = (u * squares.sqrt()) @ v
    found = spectra.by_sketch(matrix, 8, None, "a key")
    optimum = float(squares[:8].sum())
    assert found.rank == 8 and found.iterations > 1
    assert optimum * (1 - 1e-3) <= found.kept <= optimum * (1 + 1e-12)
    rest = float((matrix - found.left @ found.right).square().sum())
    assert rest == pytest.approx(found.total - found.kept, rel=1e-9)
    again = spectra.by_sketch(matrix, 8, None, "a key")
    assert torch.equal(again.left, found.left)
    other = spectra.by_sketch(matrix, 8, None, "another key")
    assert not torch.equal(other.left, found.left)


def test_a_sketched_adapter_says_so_and_its_error_is_measured(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    other = tuned(base, tmp_path / "tuned", lambda name: "up_proj" in name)
    words = ("--rank", RANK, "--svd", "randomised")
    report = extract(base, other, tmp_path / "out", *words)
    exact = extract(base, other, tmp_path / "exact", "--rank", RANK)
    for sketch, whole in zip(report["matrices"], exact["matrices"], strict=True):
        assert sketch["svd"] == "randomised" and sketch["iterations"] >= 1
        assert sketch["energy"] == pytest.approx(whole["energy"], abs=1e-3)
        assert sketch["energy"] <= whole["energy"] + 1e-9


def test_the_same_bytes_come_out_on_one_thread_and_on_three(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    other = tuned(base, tmp_path / "tuned", lambda name: True)
    for threads in (1, 3):
        extract(base, other, tmp_path / str(threads), "--rank", RANK, "--threads", threads)
    for file in ("adapter_model.safetensors", "adapter_config.json", "mergekit_ft.lock.json"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "3" / file).read_bytes()


def test_what_is_not_chosen_is_left_out_and_named(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    other = tuned(base, tmp_path / "tuned", lambda name: True)
    words = ("--rank", RANK, "--include", "*_proj.*", "--exclude", "*.mlp.*", "--others", "skip")
    report = extract(base, other, tmp_path / "out", *words)
    assert {matrix["module"].split(".")[-2] for matrix in report["matrices"]} == {"self_attn"}
    assert report["selectors"] == {"include *_proj.*": 14, "exclude *.mlp.*": 6}
    assert len(report["left_out"]) == 21 - 8 and not report["saved_modules"]
    assert any(note.startswith("left out, though changed: lm_head") for note in report["notes"])
    kept = report["totals"]["energy_of_all_changes"]
    assert 0 < kept < 1 - sum(report["left_out"].values()) + 1e-9


def test_rows_that_were_added_are_kept_whole_and_the_base_must_be_resized(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.ones(4, 16)])
    weights["model.layers.0.mlp.up_proj.weight"] += 0.1
    other = write_checkpoint(tmp_path / "tuned", weights)
    report = extract(base, other, tmp_path / "out", "--rank", RANK)
    assert report["saved_modules"] == ["lm_head", "model.embed_tokens"] and report["rows"] == 100
    assert any("resize" in note for note in report["notes"])
    assert "resize_token_embeddings(100)" in (tmp_path / "out/README.md").read_text()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(100)
    made = PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    assert torch.equal(made["lm_head.weight"], weights["lm_head.weight"])


def nan(weights: dict[str, Tensor]) -> None:
    weights["model.layers.0.mlp.up_proj.weight"][3, 2] = torch.nan


def narrow(weights: dict[str, Tensor]) -> None:
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(32, 8)


def drop(weights: dict[str, Tensor]) -> None:
    del weights["model.layers.0.mlp.up_proj.weight"]


def add(weights: dict[str, Tensor]) -> None:
    weights["score.weight"] = torch.zeros(2, 16)


def nothing(weights: dict[str, Tensor]) -> None:
    pass


def norm(weights: dict[str, Tensor]) -> None:
    weights["model.norm.weight"] += 1


@pytest.mark.parametrize(
    ("spoil", "words", "code", "said"),
    [
        (nan, ["--rank", 2], 5, "holds nan at element 50; repair the checkpoint"),
        (narrow, ["--rank", 2], 4, "has shape [32, 8], and [32, 16] in"),
        (drop, ["--rank", 2], 4, "lacks 1 of the 21 tensors"),
        (add, ["--rank", 2], 4, "score.weight stand in no tensor of"),
        (nothing, ["--rank", 2], 5, "there is nothing to extract"),
        (norm, ["--rank", 2], 5, "differs from"),
        (nothing, [], 3, "--rank 16, or --energy 0.95"),
        (nothing, ["--energy", 1.5], 3, "a share above 0, up to 1"),
        (nothing, ["--energy", "nan"], 3, "a share above 0, up to 1"),
        (nothing, ["--energy", 0.9, "--svd", "randomised"], 3, "a sketch has a size"),
        (nothing, ["--rank", 2, "--include", "*.q_prj.*"], 3, "'*.q_prj.*' matches no tensor"),
        (nothing, ["--rank", 2, "--memory", "10kB"], 5, "more than the 10,000 given"),
    ],
)
def test_what_cannot_be_extracted_is_refused_and_leaves_nothing(
    tmp_path: Path, spoil: Any, words: Any, code: int, said: str
) -> None:
    base = tiny_llama(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    spoil(weights)
    write_checkpoint(tmp_path / "tuned", weights)
    told = run("extract", base, tmp_path / "tuned", tmp_path / "out", *words, "--quiet", fails=code)
    assert said in told and told.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_others_that_changed_can_be_refused(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    other = tuned(base, tmp_path / "tuned", lambda name: "up_proj" in name or "norm" in name)
    words = ("--rank", 2, "--others", "refuse", "--quiet")
    told = run("extract", base, other, tmp_path / "out", *words, fails=5)
    assert "input_layernorm" in told and "--others save" in told


def test_an_embedding_tied_to_more_than_a_head_is_refused(tmp_path: Path) -> None:
    base = tiny_t5(tmp_path / "base")
    other = tuned(
        base, tmp_path / "tuned", lambda name: "SelfAttention.q" in name or "shared" in name
    )
    told = run("extract", base, other, tmp_path / "out", "--rank", 2, "--quiet", fails=4)
    assert "shared.weight changed" in told and "tied to" in told
    extract(base, other, tmp_path / "out", "--rank", 2, "--others", "skip")


def test_a_tuned_model_that_has_untied_its_head_is_refused(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    other = write_checkpoint(tmp_path / "tuned", weights)
    told = run("extract", base, other, tmp_path / "out", "--rank", 2, "--quiet", fails=4)
    assert "ties them" in told


def test_an_out_that_is_there_is_refused_or_replaced(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    other = tuned(base, tmp_path / "tuned", lambda name: "up_proj" in name)
    out = tmp_path / "out"
    extract(base, other, out, "--rank", 2)
    words = ("extract", base, other, out, "--rank", 3, "--quiet")
    assert "is not empty" in run(*words, fails=6)
    extract(base, other, out, "--rank", 3, "--overwrite")
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 3
    for place in (base, base / "inside", other):
        told = run("extract", base, other, place, "--rank", 3, "--overwrite", fails=6)
        assert "which is read" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "tuned"]


def test_the_receipt_has_the_digest_of_every_file(tmp_path: Path) -> None:
    from hashlib import sha256

    base = tiny_llama(tmp_path / "base")
    other = tuned(base, tmp_path / "tuned", lambda name: "up_proj" in name)
    extract(base, other, tmp_path / "out", "--rank", 2)
    receipt = json.loads((tmp_path / "out/mergekit_ft.lock.json").read_text())
    names = {path.name for path in (tmp_path / "out").iterdir()} - {"mergekit_ft.lock.json"}
    assert set(receipt["outputs"]) == names
    for name, held in receipt["outputs"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert held == {"size": len(data), "sha256": sha256(data).hexdigest()}
    files = [source["files"]["model.safetensors"] for source in receipt["sources"]]
    wanted = [
        sha256((path / "model.safetensors").read_bytes()).hexdigest() for path in (base, other)
    ]
    assert [file["sha256"] for file in files] == wanted
