"""Models brought to another's names and layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_ft.errors import SourceError
from mergekit_ft.sources import Source, open_source
from mergekit_ft.sources.names import brought
from tests.checkpoints import tiny_llama, write_checkpoint
from tests.small_models import weights

LLAMA = {"model_type": "llama"}
EXPERTS, ROWS, WIDTH = 3, 5, 4  # an expert's gate and up are (ROWS, WIDTH), its down (WIDTH, ROWS)


def opened(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Source:
    return open_source(str(write_checkpoint(folder, tensors, config=config or LLAMA)))


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def inside(tensors: dict[str, Tensor], to: str = "model.language_model.") -> dict[str, Tensor]:
    """Return a text model's tensors as a newer VLM names them."""
    return {
        name if name.startswith("lm_head") else to + name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
    }


def tower(layers: int = 3) -> dict[str, Tensor]:
    made = {f"vision.layers.{i}.self_attn.q_proj.weight": torch.randn(6, 6) for i in range(layers)}
    return made | {"projector.weight": torch.randn(8, 6)}


def mixture(seed: int) -> dict[str, Tensor]:
    """Return two layers of a mixture, a tensor for each expert's matrix."""
    dice = torch.Generator().manual_seed(seed)
    shapes = {"gate_proj": (ROWS, WIDTH), "up_proj": (ROWS, WIDTH), "down_proj": (WIDTH, ROWS)}
    made = {}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp"
        made[f"{stem}.gate.weight"] = torch.randn(EXPERTS, WIDTH, generator=dice)
        for expert in range(EXPERTS):
            for part, shape in shapes.items():
                made[f"{stem}.experts.{expert}.{part}.weight"] = torch.randn(shape, generator=dice)
    return made


def fused(apart: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a mixture with the experts of a layer in two tensors: gate above up, and down."""
    made = {name: tensor for name, tensor in apart.items() if ".experts." not in name}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        both, down = [], []
        for expert in range(EXPERTS):
            gate, up = (apart[f"{stem}.{expert}.{part}_proj.weight"] for part in ("gate", "up"))
            both.append(torch.cat([gate, up]))
            down.append(apart[f"{stem}.{expert}.down_proj.weight"])
        made[f"{stem}.gate_up_proj"] = torch.stack(both)
        made[f"{stem}.down_proj"] = torch.stack(down)
    return made


def as_mixtral(apart: dict[str, Tensor]) -> dict[str, Tensor]:
    words = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

    def named(name: str) -> str:
        for one, other in words.items():
            name = name.replace(one, other)
        return name

    return {named(name): tensor for name, tensor in apart.items()}


def all_of(source: Source) -> dict[str, Tensor]:
    return {name: source.tensor(name) for name in source}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_model_with_the_donors_names_is_left_as_it_is(tmp_path: Path) -> None:
    source = opened(tmp_path / "a", weights(1))
    assert brought(source, opened(tmp_path / "b", weights(2))) is source


@pytest.mark.parametrize("to", ["model.language_model.", "model.text_model.", "llm.model."])
def test_a_text_model_is_found_in_a_language_tower(tmp_path: Path, to: str) -> None:
    text = weights(1)
    donor = opened(tmp_path / "vlm", inside(weights(2), to) | tower())
    found = brought(opened(tmp_path / "text", text), donor)
    assert same(all_of(found), inside(text, to))


def test_all_of_a_text_model_may_lie_below_one_name(tmp_path: Path) -> None:
    text = weights(1)
    donor = opened(tmp_path / "vlm", under("language_model.", weights(2)) | tower())
    found = brought(opened(tmp_path / "text", text), donor)
    assert same(all_of(found), under("language_model.", text))


def test_a_tower_of_a_larger_model_can_be_a_source_for_a_text_model(tmp_path: Path) -> None:
    text, vision = weights(1), tower()
    source = opened(tmp_path / "vlm", inside(text) | vision)
    found = brought(source, opened(tmp_path / "text", weights(2)))
    assert same({name: t for name, t in all_of(found).items() if name in text}, text)
    assert vision.keys() <= found.keys()


def test_another_vocabulary_does_not_hide_where_a_model_belongs(tmp_path: Path) -> None:
    text = weights(1)
    text["model.embed_tokens.weight"] = torch.randn(21, 8)
    donor = opened(tmp_path / "vlm", inside(weights(2)) | tower())
    found = brought(opened(tmp_path / "text", text), donor)
    assert found["model.language_model.embed_tokens.weight"].shape == (21, 8)


def test_a_model_that_fits_two_towers_must_be_told_which(tmp_path: Path) -> None:
    one, other = inside(weights(2), "one."), inside(weights(3), "two.")
    donor = opened(tmp_path / "two", one | other)
    text = weights(1)
    source = opened(tmp_path / "text", text)
    with pytest.raises(SourceError, match=r"prefix: \{'model\.': 'one\.'\}.*'two\.'"):
        brought(source, donor)
    found = brought(source, donor, {"model.": "two."})
    assert same(all_of(found), inside(text, "two."))


def test_a_model_of_other_shapes_is_not_found_anywhere(tmp_path: Path) -> None:
    source = opened(tmp_path / "text", weights(1, width=4))
    donor = opened(tmp_path / "vlm", inside(weights(2)) | tower())
    assert brought(source, donor) is source


def test_a_prefix_that_begins_no_name_is_an_error(tmp_path: Path) -> None:
    source, donor = opened(tmp_path / "a", weights(1)), opened(tmp_path / "b", inside(weights(2)))
    with pytest.raises(
        SourceError, match=r"'modle\.' begins no tensor's name; names are like lm_head"
    ):
        brought(source, donor, {"modle.": "model.language_model."})
    with pytest.raises(SourceError, match=r"'language\.' begins no tensor's name"):
        brought(source, donor, {"model.": "language."})


def test_ties_follow_the_names(tmp_path: Path) -> None:
    text = weights(1)
    del text["lm_head.weight"]
    tied = {"model_type": "llama", "tie_word_embeddings": True}
    donor = opened(tmp_path / "vlm", under("some.part.", weights(2)) | tower())
    found = brought(opened(tmp_path / "text", text, **tied), donor)
    assert found.locate("some.part.lm_head.weight") == "some.part.model.embed_tokens.weight"


def test_experts_apart_are_stacked_as_the_donor_has_them(tmp_path: Path) -> None:
    apart = mixture(1)
    for name, tensors in (("qwen", apart), ("mixtral", as_mixtral(apart))):
        source = opened(tmp_path / name, tensors)
        donor = opened(tmp_path / f"donor-{name}", fused(mixture(2)))
        assert same(all_of(brought(source, donor)), fused(apart))


def test_fused_experts_are_cut_as_the_donor_has_them(tmp_path: Path) -> None:
    apart = mixture(1)
    source = opened(tmp_path / "fused", fused(apart))
    for name, wanted in (("qwen", apart), ("mixtral", as_mixtral(apart))):
        donor = opened(tmp_path / name, as_mixtral(mixture(2)) if name[0] == "m" else mixture(2))
        assert same(all_of(brought(source, donor)), wanted)


def test_experts_under_other_names_are_found(tmp_path: Path) -> None:
    apart = mixture(1)
    source = opened(tmp_path / "mixtral", as_mixtral(apart))
    assert same(all_of(brought(source, opened(tmp_path / "qwen", mixture(2)))), apart)


def test_experts_move_with_their_tower(tmp_path: Path) -> None:
    apart = mixture(1)
    donor = opened(tmp_path / "vlm", inside(fused(mixture(2))) | tower())
    found = brought(opened(tmp_path / "text", apart), donor)
    assert same(all_of(found), inside(fused(apart)))


def test_a_range_of_bytes_may_begin_and_end_in_the_middle_of_experts(tmp_path: Path) -> None:
    apart = mixture(1)
    source = opened(tmp_path / "apart", apart)
    found = brought(source, opened(tmp_path / "fused", fused(mixture(2))))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    wanted = fused(apart)[name].numpy().tobytes()
    for start in range(0, len(wanted), 52):
        for length in (0, 1, 24, 120, len(wanted) - start):
            stop = min(start + length, len(wanted))
            into = bytearray(stop - start)
            found.read_into(name, start, memoryview(into))
            found.will_need(name, start, stop - start)
            assert bytes(into) == wanted[start:stop]


def test_as_many_experts_as_the_donor_has_are_needed(tmp_path: Path) -> None:
    apart = {name: t for name, t in mixture(1).items() if ".experts.2." not in name}
    three, two = opened(tmp_path / "3", fused(mixture(2))), opened(tmp_path / "2", apart)
    with pytest.raises(SourceError, match="has 2 experts, not 3"):
        brought(two, three)
    with pytest.raises(SourceError, match="has 3 experts, not 2"):
        brought(three, two)


def test_transposed_fused_experts_are_refused_by_name(tmp_path: Path) -> None:
    turned = {
        name: tensor.transpose(1, 2) if tensor.dim() == 3 else tensor
        for name, tensor in fused(mixture(2)).items()
    }
    apart, donor = opened(tmp_path / "apart", mixture(1)), opened(tmp_path / "turned", turned)
    for one, other in ((apart, donor), (donor, apart)):
        with pytest.raises(SourceError, match="transposed, which is not supported"):
            brought(one, other)


def test_what_transformers_holds_fused_is_what_its_files_hold_apart(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "moe_intermediate_size": 12, "head_dim": 4, "vocab_size": 32}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **layers, num_experts=2))
    model.save_pretrained(tmp_path / "apart")
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    donor = open_source(str(write_checkpoint(tmp_path / "fused", held, config={})))
    assert same(all_of(brought(open_source(str(tmp_path / "apart")), donor)), held)


def test_a_saved_llava_takes_a_saved_llama(tmp_path: Path) -> None:
    text = open_source(str(tiny_llama(tmp_path / "text")))
    donor = opened(tmp_path / "vlm", under("language_model.", all_of(text)) | tower())
    assert same(all_of(brought(text, donor)), under("language_model.", all_of(text)))
