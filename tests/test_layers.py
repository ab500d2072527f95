"""Places: stacks, layers and roles read off tensor names."""

from __future__ import annotations

import pytest

from mergekit_ft.layers import Place, family, places


def test_llama_blocks_count_from_zero_to_the_last_layer() -> None:
    found = places([f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)])
    assert found["model.layers.1.mlp.up_proj.weight"] == Place("block", "model.layers", 1, 3)
    assert [place.depth for place in found.values()] == [0.0, 0.5, 1.0]


def test_a_missing_layer_number_does_not_shorten_the_stack() -> None:
    found = places(["h.0.attn.weight", "h.11.attn.weight"])
    assert found["h.11.attn.weight"].layers == 12


def test_t5_encoder_and_decoder_are_stacks_apart_and_count_blocks_not_sub_layers() -> None:
    found = places(
        [
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            "encoder.block.1.layer.1.DenseReluDense.wi.weight",
            "decoder.block.3.layer.2.DenseReluDense.wo.weight",
        ]
    )
    stacks = [(place.stack, place.layer, place.layers) for place in found.values()]
    assert stacks == [("encoder.block", 0, 2), ("encoder.block", 1, 2), ("decoder.block", 3, 4)]


def test_mixtral_experts_go_by_layer_not_by_expert() -> None:
    name = "model.layers.2.block_sparse_moe.experts.7.w1.weight"
    assert places([name])[name] == Place("block", "model.layers", 2, 3)


def test_a_name_that_starts_with_its_index_counts() -> None:
    assert places(["0.weight", "1.weight"])["0.weight"] == Place("block", "", 0, 2)


def test_a_number_inside_a_word_or_at_the_end_is_no_layer() -> None:
    assert places(["conv1.weight", "w.0"])["conv1.weight"].layer is None
    assert places(["w.0"])["w.0"].layer is None


def test_a_stack_of_one_layer_is_at_depth_one() -> None:
    assert places(["h.0.w"])["h.0.w"].depth == 1.0


def test_tensors_outside_stacks_have_no_depth() -> None:
    assert places(["lm_head.weight"])["lm_head.weight"].depth is None


@pytest.mark.parametrize(
    ("role", "names"),
    [
        (
            "embedding",
            [
                "model.embed_tokens.weight",
                "wte.weight",
                "transformer.wpe.weight",
                "shared.weight",
                "bert.embeddings.word_embeddings.weight",
                "bert.embeddings.LayerNorm.weight",
                "embeddings.token_type_embeddings.weight",
                "transformer.word_embeddings_layernorm.bias",
                "model.decoder.embed_positions.weight",
                "gpt_neox.embed_in.weight",
                "model.encoder.layernorm_embedding.weight",
                "visual.patch_embed.proj.weight",
                "vit.embeddings.cls_token",
                "pos_embed",
                "tok_embeddings.weight",
            ],
        ),
        (
            "norm",
            [
                "model.norm.weight",
                "transformer.ln_f.bias",
                "ln_f.weight",
                "encoder.final_layer_norm.weight",
                "gpt_neox.final_layer_norm.weight",
                "model.final_layernorm.weight",
                "vit.layernorm.weight",
                "vision_model.pre_layrnorm.weight",
                "backbone.norm_f.weight",
                "encoder.LayerNorm.weight",
            ],
        ),
        (
            "head",
            [
                "lm_head.weight",
                "lm_head.layer_norm.weight",
                "embed_out.weight",
                "score.weight",
                "classifier.bias",
                "cls.predictions.transform.LayerNorm.weight",
                "cls.predictions.decoder.weight",
                "qa_outputs.weight",
                "output.weight",
                "transformer.output_layer.weight",
            ],
        ),
        ("other", ["bert.pooler.dense.weight", "logit_scale", "model.rotary_emb.inv_freq"]),
    ],
)
def test_roles_outside_stacks_go_by_the_names_of_the_field(role: str, names: list[str]) -> None:
    assert {name: place.role for name, place in places(names).items()} == dict.fromkeys(names, role)


def test_a_family_is_what_a_tensor_is_called_in_every_layer() -> None:
    names = {
        "model.layers.11.self_attn.q_proj.weight": "self_attn.q_proj",
        "model.layers.11.self_attn.q_proj.bias": "self_attn.q_proj.bias",
        "model.layers.0.block_sparse_moe.experts.7.w1.weight": "block_sparse_moe.experts.*.w1",
        "encoder.block.3.layer.0.SelfAttention.q.weight": "layer.*.SelfAttention.q",
        "h.0.attn.bias": "attn.bias",
        "0.weight": "weight",
        "model.norm.weight": "model.norm",
        "weight": "weight",
    }
    found = places(names)
    assert {name: family(name, found[name]) for name in names} == names
