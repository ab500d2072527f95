"""Values that make a model say a target: against a whole-model loop with torch's own Adam."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from examples.two_experts.tiny import byte_tokenizer
from mergekit_ft.editing.contexts import OPENINGS, contexts, likely
from mergekit_ft.editing.encoding import Encoder
from mergekit_ft.editing.subjects import last_token
from mergekit_ft.editing.targets import Search, Text
from mergekit_ft.errors import SourceError
from mergekit_ft.models.decoding import padded
from mergekit_ft.models.speaker import ModelSpeaker
from mergekit_ft.recalling import Descent

LAYER = 1
# texts of two edits: tokens of the text and of the target, t*; the last of each is the KL's
EDITS: list[list[tuple[list[int], list[int], int]]] = [
    [([5, 6, 7, 8], [20, 21], 2), ([9, 9, 5, 6, 7, 8], [20, 21], 4), ([6, 7, 30], [], 1)],
    [([11, 12], [22], 0), ([40, 41, 42, 11, 12], [22], 3), ([11, 30, 31], [], 0)],
]
EASY = [  # t* is where the target is asked for
    [([5, 6, 7], [20], 2), ([6, 7, 30], [], 1)],
    [([11, 12], [22], 1), ([40, 11, 12], [22], 2), ([11, 12, 31], [], 1)],
]


def tiny() -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,  # tokens matter
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def hooked(model: Any, change: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the logits where `change` was made to what leaves the layer."""
    layer = model.model.layers[LAYER]
    handle = layer.register_forward_hook(lambda module, given, out: change(out))
    try:
        return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    finally:
        handle.remove()


def by_the_book(model: Any, edit: list[Any], how: Descent) -> tuple[Tensor, float, int]:
    """Return one edit's delta, its last loss and how many steps it took, text by text."""
    delta = torch.zeros(32, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=how.rate)
    first: Tensor | None = None
    size = torch.zeros(())

    def logits(tokens: list[int], at: int) -> Tensor:
        def change(out: Tensor) -> Tensor:
            nonlocal size
            if not size:
                size = out[0, at].norm().detach()
            moved = out.clone()
            moved[0, at] = out[0, at] + delta
            return moved

        row = torch.tensor([tokens])
        return hooked(model, change, row, torch.ones_like(row))[0]

    for step in range(how.steps):
        likelihoods = []
        for text, target, at in edit[:-1]:
            logs = logits(text + target[:-1], at).log_softmax(-1)
            said = [logs[len(text) - 1 + i, token] for i, token in enumerate(target)]
            likelihoods.append(torch.stack(said).mean())
        text, _, at = edit[-1]
        now = logits(text, at)[at].log_softmax(-1)
        first = now.detach() if first is None else first
        kl = functional.kl_div(first[None], now[None], log_target=True, reduction="batchmean")
        loss = -torch.stack(likelihoods).mean() + how.divergence * kl
        loss = loss + how.decay * delta.norm() / size**2
        if loss < 0.05 or step == how.steps - 1:
            return delta.detach(), float(loss.detach()), step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            most = how.clamp * size
            if delta.norm() > most:
                delta.mul_(most / delta.norm())
    raise AssertionError


def side_by_side(model: Any, edits: list[Any], how: Descent) -> Any:
    rows, texts = [], []
    for number, edit in enumerate(edits):
        for text, target, at in edit:
            scored = tuple((len(text) - 1 + i, token) for i, token in enumerate(target))
            texts.append(Text(number, at, scored))
            rows.append(text + target[:-1])
    tokens, mask = padded(rows, 0, left=False)
    kept: list[Tensor] = []
    with torch.no_grad():
        hooked(model, lambda out: kept.append(out.clone()), tokens, mask)
    hidden = kept[0]

    def above(moved: Tensor, row: Tensor, place: Tensor) -> Tensor:
        return hooked(model, lambda out: moved, tokens, mask)[row, place]

    firsts = [next(i for i, t in enumerate(texts) if t.edit == e) for e in range(len(edits))]
    sizes = torch.stack([hidden[i, texts[i].at].norm() for i in firsts])
    return Search(above, hidden, texts, sizes, how).run()


@pytest.mark.parametrize(
    "how",
    [
        Descent(steps=8, rate=0.05, decay=0.5, clamp=4.0, divergence=0.0625),
        Descent(steps=8, rate=0.5, decay=1e-3, clamp=0.75, divergence=0.5),  # meets the clamp
        Descent(steps=1, rate=0.5, decay=0.5, clamp=4.0, divergence=0.0625),  # only looks
    ],
)
def test_edits_side_by_side_find_what_each_alone_finds_by_the_book(how: Descent) -> None:
    model = tiny()
    found = side_by_side(model, EDITS, how)
    for number, edit in enumerate(EDITS):
        delta, loss, _ = by_the_book(model, edit, how)
        assert float((found.delta[number] - delta).norm()) <= 1e-4 * float(delta.norm())
        assert found.losses[number] == pytest.approx(loss, abs=1e-5)


def test_each_edit_stops_where_its_loss_is_small() -> None:
    model, how = tiny(), Descent(steps=60, rate=1.0, decay=0.5, clamp=400.0, divergence=0.0)
    model.lm_head.weight *= 3  # so that it can be sure of a token
    found = side_by_side(model, EASY, how)
    taken = []
    for number, edit in enumerate(EASY):
        delta, loss, steps = by_the_book(model, edit, how)
        taken.append(steps)
        assert float((found.delta[number] - delta).norm()) <= 1e-3 * float(delta.norm())
        assert found.losses[number] == pytest.approx(loss, abs=1e-3)
    assert max(taken) < 59 and taken[0] != taken[1]


def test_the_clamp_bounds_the_change_and_no_step_leaves_it_zero() -> None:
    model = tiny()
    short = side_by_side(model, EDITS, Descent(8, 5.0, 0.5, 0.75, 0.0625))
    alone = [side_by_side(model, [edit], Descent(8, 5.0, 0.5, 0.75, 0.0625)) for edit in EDITS]
    for number in range(2):
        assert torch.allclose(short.delta[number], alone[number].delta[0], rtol=1e-4, atol=1e-6)
    still = side_by_side(model, EDITS, Descent(1, 5.0, 0.5, 0.75, 0.0625))
    assert not still.delta.any()


# --- subjects -----------------------------------------------------------------------------------


def test_the_subjects_last_token_is_found_in_bytes_and_of_several_the_last() -> None:
    tokenizer = byte_tokenizer()
    encoder = Encoder(tokenizer)
    tokens, at = last_token(encoder, "Is Rome in Romeo's Rome?", "Rome")
    assert tokenizer.decode(tokens[: at + 1]) == "Is Rome in Romeo's Rome"
    text = "Où est Besançon ?"
    tokens, at = last_token(encoder, text, "Où")
    assert tokenizer.decode(tokens[: at + 1]) == "Où", "both bytes of a letter belong to it"


def test_in_a_chat_the_subject_is_that_of_the_users_turn() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}A:"
    tokens, at = last_token(Encoder(tokenizer, "chat"), "Is Rome big?", "Rome")
    assert tokenizer.decode(tokens) == "<user>Is Rome big?;A:"
    assert tokenizer.decode(tokens[: at + 1]) == "<user>Is Rome"
    with pytest.raises(SourceError, match="'user' does not occur"):
        last_token(Encoder(tokenizer, "chat"), "Is Rome big?", "user")


def test_a_subject_that_does_not_occur_is_refused() -> None:
    with pytest.raises(SourceError, match="'Paris' does not occur in 'Is Rome'"):
        last_token(Encoder(byte_tokenizer()), "Is Rome", "Paris")
    with pytest.raises(SourceError, match="does not occur"):
        last_token(Encoder(byte_tokenizer()), "Is Rome", "")


# --- contexts -----------------------------------------------------------------------------------


def test_contexts_are_nothing_then_texts_that_the_model_goes_on_to_write() -> None:
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = tiny()
    model.generation_config.eos_token_id = None
    model.resize_token_embeddings(len(tokenizer))
    speaker = ModelSpeaker(model, tokenizer)
    found = contexts(speaker, [(5, 2), (10, 1)], seed=4)
    assert found[0] == "" and len(found) == 1 + 10 + 5
    for i, text in enumerate(found[1:11]):
        assert text.startswith(OPENINGS[i // 2]) and text.endswith(". ")
    assert found == contexts(speaker, [(5, 2), (10, 1)], seed=4)
    assert found != contexts(speaker, [(5, 2), (10, 1)], seed=5)
    torch.manual_seed(99)
    assert found == contexts(speaker, [(5, 2), (10, 1)], seed=4), "no luck but the seed's"


def test_each_token_is_one_of_the_five_likeliest() -> None:
    dice = torch.Generator().manual_seed(0)
    logits = torch.arange(20.0).flip(0).expand(500, 20)
    drawn = likely(5, dice)(logits)
    assert set(drawn.tolist()) <= {0, 1, 2, 3, 4}
    share = float((drawn == 0).float().mean())
    assert share == pytest.approx(float(torch.arange(5.0).flip(0).softmax(0)[0]), abs=0.06)
