"""Tied weights, by config and by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_ft.sources import open_source
from mergekit_ft.sources.ties import tie_word_embeddings
from tests import checkpoints
from tests.checkpoints import write_checkpoint

TENSORS = {
    "model.embed_tokens.weight": torch.randn(7, 4),
    "model.layers.0.mlp.up_proj.weight": torch.randn(5, 4).to(torch.bfloat16),
    "model.layers.1.mlp.up_proj.weight": torch.randn(5, 4).to(torch.float16),
    "model.norm.weight": torch.randn(4).to(torch.float64),
    "model.steps": torch.tensor(3),
}


def test_tied_heads_of_real_models_are_found(tmp_path: Path) -> None:
    makers: dict[str, tuple[Callable[..., Path], dict[str, str]]] = {
        "llama": (checkpoints.tiny_llama, {}),
        "qwen2": (checkpoints.tiny_qwen2, {"lm_head.weight": "model.embed_tokens.weight"}),
        "gpt2": (checkpoints.tiny_gpt2, {"lm_head.weight": "transformer.wte.weight"}),
        "bert": (
            checkpoints.tiny_bert,
            {
                "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
                "cls.predictions.decoder.bias": "cls.predictions.bias",
            },
        ),
        "t5": (
            checkpoints.tiny_t5,
            {
                "encoder.embed_tokens.weight": "shared.weight",
                "decoder.embed_tokens.weight": "shared.weight",
                "lm_head.weight": "shared.weight",
            },
        ),
    }
    for name, (make, expected) in makers.items():
        source = open_source(str(make(tmp_path / name, shards=2)))
        assert source.ties == expected, name
        for head, embedding in expected.items():
            assert head not in source
            assert source.locate(head) == embedding


def test_ties_are_what_transformers_makes_of_the_same_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    for make, kind in (
        (checkpoints.tiny_qwen2, AutoModelForCausalLM),
        (checkpoints.tiny_gpt2, AutoModelForCausalLM),
        (checkpoints.tiny_bert, AutoModelForMaskedLM),
        (checkpoints.tiny_t5, AutoModelForSeq2SeqLM),
    ):
        folder = make(tmp_path / make.__name__)
        model = kind.from_pretrained(folder)
        state, source = model.state_dict(), open_source(str(folder))
        for name, tensor in state.items():
            where = source.locate(name)
            assert where is not None, name
            assert torch.equal(source.tensor(where), tensor)
        for name, embedding in source.ties.items():
            assert state[name].data_ptr() == state[embedding].data_ptr()


def test_the_default_of_tying_is_that_of_transformers() -> None:
    from transformers import CONFIG_MAPPING

    from mergekit_ft.sources.ties import UNTIED

    for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "opt", "bert", "t5"):
        default = CONFIG_MAPPING[kind]().tie_word_embeddings
        assert tie_word_embeddings({"model_type": kind}) == default, kind
    known = set(CONFIG_MAPPING.keys())
    for kind in UNTIED & known:
        assert not getattr(CONFIG_MAPPING[kind], "tie_word_embeddings", False), kind


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"model_type": "llama", "tie_word_embeddings": True}, True),
        ({"model_type": "gpt2", "tie_word_embeddings": False}, False),
        ({"model_type": "llava", "text_config": {"tie_word_embeddings": True}}, True),
        ({"model_type": "llava", "text_config": {"model_type": "gemma2"}}, True),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, False),
        ({"model_type": "llava"}, False),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, True),
    ],
)
def test_a_config_says_whether_the_head_is_tied(config: dict[str, Any], tied: bool) -> None:
    assert tie_word_embeddings(config) is tied


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("model.embed_tokens.weight", "lm_head.weight"),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        ("model.language_model.embed_tokens.weight", "lm_head.weight"),
        ("gpt_neox.embed_in.weight", "embed_out.weight"),
        ("model.decoder.embed_tokens.weight", "lm_head.weight"),
        ("model.shared.weight", "model.encoder.embed_tokens.weight"),
        ("model.shared.weight", "lm_head.weight"),
        ("transformer.word_embeddings.weight", "lm_head.weight"),
        ("backbone.embeddings.weight", "lm_head.weight"),
    ],
)
def test_a_head_is_found_by_the_name_of_its_embedding(
    tmp_path: Path, embedding: str, head: str
) -> None:
    config = {"tie_word_embeddings": True}
    write_checkpoint(tmp_path, {embedding: torch.ones(3, 2)}, config=config)
    assert open_source(str(tmp_path)).locate(head) == embedding


def test_a_head_that_is_present_answers_for_itself(tmp_path: Path) -> None:
    same, other = torch.ones(3, 2), torch.zeros(3, 2)
    for head, agrees in ((same, True), (other, False), (same.half(), False)):
        tensors = {"model.embed_tokens.weight": same, "lm_head.weight": head}
        write_checkpoint(tmp_path, tensors, config={"tie_word_embeddings": True})
        source = open_source(str(tmp_path))
        assert source.locate("lm_head.weight") == "lm_head.weight"
        assert source.ties == {"lm_head.weight": "model.embed_tokens.weight"}
        assert source.agrees("lm_head.weight") is agrees


def test_a_head_of_another_shape_is_not_tied(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.ones(3, 2), "lm_head.weight": torch.ones(4, 2)}
    write_checkpoint(tmp_path, tensors, config={"tie_word_embeddings": True})
    assert open_source(str(tmp_path)).ties == {}


def test_what_is_not_there_is_not_located(tmp_path: Path) -> None:
    source = open_source(str(write_checkpoint(tmp_path, TENSORS, config={"model_type": "llama"})))
    assert source.locate("lm_head.weight") is None
    assert source.locate("model.norm.weight") == "model.norm.weight"
    with pytest.raises(KeyError):
        source["lm_head.weight"]
