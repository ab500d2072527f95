"""A model as memories: keys, values and what is wanted, against hooks on the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.two_experts.tiny import byte_tokenizer
from mergekit_ft.editing.encoding import Encoder
from mergekit_ft.editing.facts import Edit
from mergekit_ft.editing.matrices import matrices, require
from mergekit_ft.editing.memory import Fact, ModelMemory, fact, keys_of
from mergekit_ft.errors import OperatorError, SourceError
from mergekit_ft.models.layered import Layered, Look, Texts
from mergekit_ft.models.opening import Base
from mergekit_ft.recalling import Descent
from tests.solved import ASKED, BEFORE, KINDS, near, opened, watched


def memory_of(base: Base, layers: range = range(4)) -> ModelMemory:
    layered = Layered(base)
    found = matrices(base, layered)
    kept = {layer: require(base, layered, layer, found) for layer in layers}
    facts = [fact(Encoder(base.tokenizer, eos=False), edit, BEFORE) for edit in ASKED]
    return ModelMemory(layered, kept, facts, {}, lambda line: None)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_are_those_of_each_text_run_alone(kind: str, tmp_path: Path) -> None:
    base = opened(tmp_path, kind)
    memory = memory_of(base)
    module, layer = memory.matrices[1].module, memory.layered.layers[1]
    keys, values, leaving = (
        memory.keys(1, 0.5),
        memory.values(1, "matrix"),
        memory.values(1, "layer"),
    )
    for i, of in enumerate(memory.facts):
        (row, at), *others = of.texts
        given, out = watched(base, module, row)
        behind = torch.stack([watched(base, module, r)[0][a] for r, a in others])
        assert near(keys[:, i], 0.5 * given[at] + 0.5 * behind.mean(dim=0))
        assert near(values[:, i], out[at])
        assert near(leaving[:, i], watched(base, layer, row)[1][at])
        assert near(memory.answers(1, given[at][:, None])[:, 0], out[at])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_the_matrix_answers(kind: str, tmp_path: Path) -> None:
    memory = memory_of(opened(tmp_path, kind))
    keys, before = memory.keys(2, 1 / 3), memory.answers(2, memory.keys(2, 1 / 3))
    dice = torch.Generator().manual_seed(0)
    update = torch.randn(32, len(keys), generator=dice, dtype=torch.float64)
    memory.write(2, update)
    assert near(memory.answers(2, keys), before + update @ keys, 1e-6)
    assert torch.equal(memory.keys(2, 1 / 3), keys), "nothing below changed"
    with pytest.raises(OperatorError, match="not of numbers"):
        memory.write(2, update * float("nan"))


@pytest.mark.parametrize("kind", [*KINDS, "gemma2", "mixtral"])
@pytest.mark.parametrize("split", [0, 5])
def test_going_on_from_a_layer_says_what_the_whole_model_says(
    kind: str, split: int, tmp_path: Path
) -> None:
    base = opened(tmp_path, kind)
    layered = Layered(base)
    tokens = torch.arange(60, 96).view(3, 12)
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    mask[2, : min(split, 3)] = 0  # what is read first is padded on the left
    rows, places = torch.tensor([0, 0, 1, 2]), torch.tensor([5, 11, 6, 8])
    whole = []
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        alone = tokens[row][mask[row].bool()][None]
        shift = int((mask[row, :split] == 0).sum())
        with torch.no_grad():
            whole.append(base.model(input_ids=alone).logits[0, place - shift])
    texts = layered.begin(tokens, mask, split) if split else Texts(tokens, mask)
    for layer in (0, 2, 3):
        (leaving,) = layered.look(texts, [Look(layered.layers[layer], out=True)])
        said = layered.above(texts, layer, leaving, rows, places - split)
        assert torch.allclose(said, torch.stack(whole), atol=1e-5)
    assert all("forward" not in vars(layer) for layer in layered.layers), "as it was"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("part", ["matrix", "layer"])
def test_wanted_values_make_the_target_likelier_where_they_are_put(
    kind: str, part: Any, tmp_path: Path
) -> None:
    base = opened(tmp_path, kind)
    memory = memory_of(base)
    how = Descent(steps=12, rate=0.5, decay=0.1, clamp=20.0, divergence=0.0625)
    before = memory.values(1, part)
    wanted = memory.wanted(1, part, how)
    module = memory.layered.layers[1] if part == "layer" else memory.matrices[1].module
    for i, of in enumerate(memory.facts):
        (row, at) = of.texts[0]
        whole = torch.tensor([row + of.target[:-1]])

        def likely(
            put: Tensor,
            at: int = at,
            whole: Tensor = whole,
            n: int = len(row),
            target: Any = of.target,
        ) -> float:
            def change(module: Any, given: Any, out: Any) -> Any:
                moved = out.clone()
                moved[0, at] += put.float()
                return moved

            handle = module.register_forward_hook(change)
            logs = base.model(input_ids=whole).logits[0].log_softmax(-1)
            handle.remove()
            return float(sum(logs[n - 1 + j, token] for j, token in enumerate(target)))

        move = wanted[:, i] - before[:, i]
        assert float(move.norm()) <= 20.0 * float(before[:, i].norm()) * 1.0001
        with torch.no_grad():
            assert likely(move) > likely(torch.zeros(32))
    assert len(memory.losses) == 3


def test_keys_of_windows_leave_padding_out(tmp_path: Path) -> None:
    base = opened(tmp_path, "llama")
    memory = memory_of(base)
    windows = [tuple(range(60, 60 + n)) for n in (9, 3, 12, 1, 5, 7, 2, 2, 11)]
    seen = list(keys_of(memory.layered, memory.matrices, 0)(windows, [0, 2]))
    for layer in (0, 2):
        rows = [rows for at, rows in seen if at == layer]
        for window, found in zip(sorted(windows, key=len), rows, strict=True):
            given, _ = watched(base, memory.matrices[layer].module, window)
            assert found.shape == (len(window), 48) and near(found.double(), given)


def test_what_is_normalised_on_its_way_cannot_be_written_in_closed_form(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"scaled or normalised before .* locft_bf can"):
        memory_of(opened(tmp_path, "gemma2"))


def test_a_layer_of_experts_has_no_one_matrix(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"layer 0 has no one matrix that ends its MLP"):
        memory_of(opened(tmp_path, "mixtral"))


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (Edit("e:3", "Is Rome big?", "no", "Paris"), "e:3: the subject 'Paris' does not occur in"),
        (Edit("e:3", "Is Rome big?", "no"), "e:3: has no subject"),
        (Edit("e:3", "Is Rome big?", "no", "Rome", weight=2.0), "e:3: weight has no effect"),
        (Edit("e:3", "Is Rome big?", " ", "Rome"), "e:3: the target is empty"),
    ],
)
def test_an_edit_that_cannot_be_written_is_refused_by_its_line(edit: Edit, told: str) -> None:
    with pytest.raises(SourceError, match=told):
        fact(Encoder(byte_tokenizer()), edit, BEFORE)


def test_contexts_stand_before_the_prompt_and_the_key_moves_with_them() -> None:
    tokenizer = byte_tokenizer()
    found: Fact = fact(Encoder(tokenizer), Edit("e:1", "Is Rome big?", "no", "Rome"), BEFORE)
    for before, (tokens, at) in zip(BEFORE, found.texts, strict=True):
        assert tokenizer.decode(tokens) == before + "Is Rome big?"
        assert tokenizer.decode(tokens[: at + 1]) == before + "Is Rome"
    assert tokenizer.decode(found.essence[0]) == "Rome is a"
    assert tokenizer.decode(found.essence[0][: found.essence[1] + 1]) == "Rome"
