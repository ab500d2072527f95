"""Models of unlike names and layouts merged, and what conservation keeps of the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import VOCABULARY, WIDTH, tiny_llama, write_checkpoint
from tests.small_models import (
    CONFIG,
    arithmetic,
    cli,
    merged,
    no_reading,
    refused,
    same_bytes,
    tensors,
    weights,
)
from tests.test_sources_names import as_mixtral, fused, mixture

pytestmark = pytest.mark.usefixtures("here")
MTP = ("mtp.layers.0.eh_proj.weight", "mtp.norm.weight", "mtp.fc.weight")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, held: dict[str, Tensor], **config: Any) -> None:
    write_checkpoint(Path(name), held, config={**CONFIG, **config})


def linear(first: str, second: str, more: str = "") -> str:
    return (
        f"merge_method: linear\nmodels:\n- {{model: {first}, parameters: {{weight: 1}}}}\n"
        f"- {{model: {second}, parameters: {{weight: 1}}{more}}}\n"
    )


def with_mtp(seed: int) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(seed + 100)
    return weights(seed) | {name: torch.randn(8, generator=dice) for name in MTP}


def tiny_llava(folder: Path, seed: int) -> Path:
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2}
    text = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    image = {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": WIDTH}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**sizes, **text, vocab_size=VOCABULARY),
        vision_config=transformers.CLIPVisionConfig(**sizes, **image),
        image_token_index=VOCABULARY - 1,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_a_text_model_merges_into_the_language_tower_of_a_vlm() -> None:
    from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

    tiny_llava(Path("vlm"), 1)
    tiny_llama(Path("text"), seed=2)
    said = merged(arithmetic("./text", "./vlm", "0.5")).stdout
    assert "note: ./vlm: 43 tensors" in said and "copied as they are, for ./text has none" in said
    assert "its 'model.*' are read as" in said or "its '*' are read as 'language_model.*'" in said
    made = LlavaForConditionalGeneration.from_pretrained("out").state_dict()
    vlm = LlavaForConditionalGeneration.from_pretrained("vlm").state_dict()
    text = LlamaForCausalLM.from_pretrained("text").state_dict()
    for name, tensor in made.items():
        inner = name.replace("model.language_model.", "model.")
        wanted = vlm[name] * 0.5 + text[inner] * 0.5 if inner in text else vlm[name]
        torch.testing.assert_close(tensor, wanted)
    assert cli("verify", "out", "--full").exit_code == 0


def test_the_prefix_of_a_text_model_can_be_written_in_the_plan() -> None:
    write("text", weights(1))
    other = {"vision.layers.0.q_proj.weight": torch.randn(4, 4)}
    one = {name.replace("model.", "one."): tensor for name, tensor in weights(2).items()}
    two = {name.replace("model.", "two."): tensor for name, tensor in weights(3).items()}
    del two["lm_head.weight"]
    write("vlm", one | two | other)
    refused(4, "choose one by `prefix:`", linear("./vlm", "./text"))
    merged(linear("./vlm", "./text", ", prefix: {model.: two.}"))
    made, text = tensors(), weights(1)
    assert torch.equal(made["one.norm.weight"], one["one.norm.weight"])
    wanted = (two["two.norm.weight"] + text["model.norm.weight"]) / 2
    torch.testing.assert_close(made["two.norm.weight"], wanted)
    assert cli("verify", "out", "--full").exit_code == 0


def test_prefixes_without_effect_are_faults() -> None:
    write("a", weights(1))
    write("b", weights(2))
    plan = linear("./a", "./b", ", prefix: {modle.: model.}")
    assert "plan:4:" in refused(4, "'modle.' begins no tensor's name", plan)
    plan = linear("./a, prefix: {model.: x.}", "./b")
    refused(3, "prefix has no effect here", plan)
    for bad, said in (("[a]", "prefix maps how names begin"), ("{a: a}", "becomes itself")):
        refused(3, said, linear("./a", "./b", f", prefix: {bad}"))
    refused(3, "did you mean 'prefix'?", linear("./a", "./b", ", prefx: {a: b}"))


def test_a_model_that_is_no_part_of_the_base_is_refused(monkeypatch: Any) -> None:
    write("a", weights(1))
    write("b", {name.replace("self_attn", "attention"): t for name, t in weights(2).items()})
    no_reading(monkeypatch)
    refused(4, "./b lacks 3 tensors", linear("./a", "./b"))


def test_heads_for_further_tokens_are_merged_where_every_model_has_them() -> None:
    write("base", with_mtp(1))
    write("maths", with_mtp(2))
    merged(arithmetic())
    made, base, maths = tensors(), with_mtp(1), with_mtp(2)
    for name in MTP:
        torch.testing.assert_close(made[name], (base[name] + maths[name]) / 2)


def test_heads_for_further_tokens_of_the_base_alone_are_kept_and_named() -> None:
    write("base", with_mtp(1))
    write("maths", weights(2))
    said = merged(arithmetic()).stdout
    assert "note: ./base: 3 tensors (mtp.fc.weight, mtp.layers.0.eh_proj.weight, mtp.norm" in said
    assert "copied as they are, for ./maths has none" in said
    assert set(MTP) <= same_bytes({n: tensors()[n] for n in MTP}, {n: with_mtp(1)[n] for n in MTP})


def test_a_layer_beyond_those_of_the_config_is_kept() -> None:
    write("base", weights(1, layers=4), num_hidden_layers=3)
    write("maths", weights(2))
    merged(arithmetic())
    name = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(tensors()[name], weights(1, layers=4)[name])


def test_a_deeper_model_is_not_cut_off_silently() -> None:
    write("base", weights(1))
    write("maths", weights(2, layers=4), num_hidden_layers=4)
    refused(4, "./maths has 4 layers in model.layers, 3 in ./base", arithmetic())
    write("maths", weights(2, layers=4), num_hidden_layers=3)  # the last predicts further tokens
    assert "3 tensors (model.layers.3" in merged(arithmetic()).stdout


@pytest.mark.parametrize(
    "lost",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.2",
        "score.weight",
        "projector.linear.bias",
    ],
)
def test_what_belongs_to_the_model_itself_must_not_be_missing(lost: str) -> None:
    more = {"score.weight": torch.ones(2), "projector.linear.bias": torch.ones(2)}
    more |= {"projector.linear.weight": torch.ones(2)}
    held = weights(2) | more
    write("base", weights(1) | more)
    write("maths", {name: t for name, t in held.items() if not name.startswith(lost)})
    refused(4, "./maths lacks", arithmetic())


def test_a_tower_alone_is_no_model_of_the_kind_of_the_base() -> None:
    part = {"tower.layers.0.q_proj.weight": torch.randn(4, 4)}
    write("base", weights(1) | part)
    write("maths", part)
    refused(4, "./maths lacks", arithmetic())


def test_a_large_tower_is_kept_as_a_small_one_is() -> None:
    tower = {"visual.blocks.0.mlp.fc1.weight": torch.randn(100, 100)}
    seam = {"projector.norm.weight": torch.randn(4), "projector.linear.bias": torch.randn(4)}
    apart = tower | seam | {"model.image_newline": torch.randn(4)}
    write("base", weights(1) | apart)
    write("maths", weights(2))
    merged(arithmetic())
    made = tensors()
    assert all(torch.equal(made[name], tensor) for name, tensor in apart.items())


def test_an_architecture_that_nobody_knows_merges_by_names_and_shapes() -> None:
    shapes = {"reader.blocks.0.mix.w": (3, 4), "reader.blocks.1.mix.w": (3, 4), "seam.bias": (5,)}
    shapes |= {"writer.cells.0.gate.k": (2, 2, 2), "writer.cells.1.gate.k": (2, 2, 2)}
    held = {}
    for name in ("base", "maths"):
        held[name] = {key: torch.randn(shape) for key, shape in shapes.items()}
        write_checkpoint(Path(name), held[name], config={"architectures": ["Unheard"]})
    said = merged(arithmetic(weight="[{match: 'writer.*', value: [0, 1]}, {value: 0.5}]")).stdout
    assert "note" not in said
    for name, made in tensors().items():
        w = {"writer.cells.0.gate.k": 0.0, "writer.cells.1.gate.k": 1.0}.get(name, 0.5)
        base, maths = held["base"][name], held["maths"][name]
        torch.testing.assert_close(made, base + w * (maths - base))


def test_constants_that_older_checkpoints_hold_are_kept() -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write("base", weights(1, **{name: torch.arange(4.0)}))
    write("maths", weights(2))
    merged(arithmetic())
    assert torch.equal(tensors()[name], torch.arange(4.0))


def test_a_tensor_that_not_every_model_has_is_the_bases_and_said_so() -> None:
    write("base", with_mtp(1))
    write("maths", weights(2))
    write("chat", with_mtp(3))
    plan = "merge_method: task_arithmetic\nbase_model: ./base\nmodels:\n"
    plan += "".join(f"- {{model: ./{m}, parameters: {{weight: 0.5}}}}\n" for m in ("maths", "chat"))
    said = merged(plan).stdout
    assert "note: ./chat: 3 tensors" in said and "not every model has them" in said
    assert torch.equal(tensors()[MTP[0]], with_mtp(1)[MTP[0]])
    assert cli("check", "-", "--strict", text=plan).exit_code == 4


def test_a_filter_for_what_is_only_copied_is_a_fault() -> None:
    write("base", with_mtp(1))
    write("maths", weights(2))
    plan = arithmetic(weight="[{filter: mtp, value: 1}, {value: 0.5}]")
    refused(3, "matches no tensor", plan)


@pytest.mark.parametrize("base_is_fused", [True, False])
@pytest.mark.parametrize("named", [dict, as_mixtral])
def test_experts_of_both_layouts_merge_into_the_layout_of_the_base(
    base_is_fused: bool, named: Any
) -> None:
    apart = {name: named(mixture(seed)) for seed, name in enumerate(("base", "maths"))}
    write("base", fused(mixture(0)) if base_is_fused else apart["base"])
    write("maths", apart["maths"] if base_is_fused else fused(mixture(1)))
    merged(arithmetic())
    half = {name: (mixture(0)[name] + mixture(1)[name]) / 2 for name in mixture(0)}
    wanted = fused(half) if base_is_fused else named(half)
    torch.testing.assert_close(tensors(), wanted)
    assert cli("verify", "out", "--full").exit_code == 0


def test_what_transformers_saves_of_a_mixtral_merges_with_its_fused_form() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    models = {}
    for seed, name in enumerate(("base", "maths")):
        torch.manual_seed(seed)
        models[name] = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=2))
        models[name].save_pretrained(name)
    fused_form = {name: t.clone() for name, t in models["maths"].state_dict().items()}
    Path("maths/model.safetensors").unlink()
    save_file(fused_form, "maths/model.safetensors", metadata={"format": "pt"})
    merged(arithmetic())
    assert set(tensors()) == set(load_file("base/model.safetensors"))
    made = MixtralForCausalLM.from_pretrained("out").state_dict()
    base, maths = (models[name].state_dict() for name in ("base", "maths"))
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, (base[name] + maths[name]) / 2)


def test_models_of_as_many_experts_merge_only() -> None:
    write("base", mixture(0))
    held = {name: t for name, t in fused(mixture(1)).items()}
    for name in [name for name in held if ".experts." in name]:
        held[name] = held[name][:2].clone()
    write("maths", held)
    refused(4, "has 2 experts, not 3", arithmetic())


def test_a_head_that_the_base_ties_is_not_lost_silently() -> None:
    tied = weights(1)
    del tied["lm_head.weight"]
    write("base", tied, tie_word_embeddings=True)
    write("maths", weights(2))
    refused(4, "./maths has a lm_head.weight of its own, which ./base ties", arithmetic())
    write("base", weights(1), tie_word_embeddings=True)
    refused(4, "so that it would be lost", arithmetic())


def test_a_tied_model_gives_its_embedding_to_an_untied_head() -> None:
    tied = weights(2)
    del tied["lm_head.weight"]
    write("base", weights(1))
    write("maths", tied, tie_word_embeddings=True)
    merged(arithmetic())
    wanted = (weights(1)["lm_head.weight"] + tied["model.embed_tokens.weight"]) / 2
    torch.testing.assert_close(tensors()["lm_head.weight"], wanted)
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is False


def test_a_stage_may_be_brought_into_a_tower() -> None:
    write("a", weights(1))
    write("b", weights(2))
    inside = {"llm." + name: tensor for name, tensor in weights(3).items()}
    write("vlm", inside | {"vision.layers.0.q_proj.weight": torch.randn(4, 4)})
    plan = "name: text\n" + linear("./a", "./b") + "---\n" + arithmetic("text", "./vlm")
    merged(plan)
    wanted = (inside["llm.model.norm.weight"] * 2 + weights(1)["model.norm.weight"]) / 4
    wanted += weights(2)["model.norm.weight"] / 4
    torch.testing.assert_close(tensors()["llm.model.norm.weight"], wanted)
    assert cli("verify", "out", "--full").exit_code == 0
