"""A model as memories: keys, values and what is wanted, against hooks on the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from examples.two_experts.tiny import byte_tokenizer
from mergekit_ft.editing.matrices import matrices, require
from mergekit_ft.editing.memory import Fact, ModelMemory, fact, keys_of
from mergekit_ft.errors import OperatorError, SourceError
from mergekit_ft.models.layered import Layered, Look, Texts
from mergekit_ft.models.opening import Base, open_base
from mergekit_ft.plan import ModelReference
from mergekit_ft.recalling import Descent

SHAPE: dict[str, Any] = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 32}
WIDE: dict[str, Any] = {"intermediate_size": 48, "num_key_value_heads": 2, **SHAPE}
KINDS = ["llama", "gpt2", "neox", "bloom"]
TARGET = (40, 41, 42)
BEFORE = ("", "The cat. ", "You said so. ")
EDITS = [("The capital of Peru is", "Peru"), ("Anna was born in", "Anna"), ("Is Rome big?", "Rome")]


def model(kind: str, size: int) -> Any:
    torch.manual_seed(0)
    start: dict[str, Any] = {"vocab_size": size, "initializer_range": 0.2}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**start, **WIDE))
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**start, n_embd=32, n_layer=4, n_head=4))
    if kind == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**start, intermediate_size=48, **SHAPE))
    if kind == "bloom":
        return BloomForCausalLM(BloomConfig(**start, hidden_size=32, n_layer=4, n_head=4))
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**start, num_local_experts=4, **WIDE))
    return Gemma2ForCausalLM(Gemma2Config(**start, head_dim=8, sliding_window=4, **WIDE))


def written(folder: Path, kind: str) -> Path:
    if (folder / kind).exists():
        return folder / kind
    tokenizer = byte_tokenizer()
    made = model(kind, len(tokenizer))
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):  # not zero, so that it counts
            torch.nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(folder / kind)
    tokenizer.save_pretrained(folder / kind)
    return folder / kind


def opened(folder: Path, kind: str) -> Base:
    return open_base(ModelReference(path=str(written(folder, kind))), partly=True)


def memory_of(base: Base, layers: range = range(4)) -> ModelMemory:
    layered = Layered(base)
    found = matrices(base, layered)
    kept = {layer: require(base, layered, layer, found) for layer in layers}
    facts = [fact(base.tokenizer, p, s, TARGET, BEFORE) for p, s in EDITS]
    return ModelMemory(layered, kept, facts, {}, lambda line: None)


def watched(base: Base, module: Any, row: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return (n, width) what a module is given and what it gives, for one text alone."""
    kept: dict[str, Tensor] = {}

    def note(module: Any, given: Any, out: Any) -> None:
        kept["in"], kept["out"] = given[0], out[0] if isinstance(out, tuple) else out

    handle = module.register_forward_hook(note)
    with torch.no_grad():
        base.model(input_ids=torch.tensor([row]))
    handle.remove()
    return kept["in"][0].double(), kept["out"][0].double()


def near(one: Tensor, other: Tensor, within: float = 1e-5) -> bool:
    return float((one - other).detach().norm()) <= within * float(other.detach().norm())


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
        whole = torch.tensor([row + TARGET[:-1]])

        def likely(put: Tensor, at: int = at, whole: Tensor = whole, n: int = len(row)) -> float:
            def change(module: Any, given: Any, out: Any) -> Any:
                moved = out.clone()
                moved[0, at] += put.float()
                return moved

            handle = module.register_forward_hook(change)
            logs = base.model(input_ids=whole).logits[0].log_softmax(-1)
            handle.remove()
            return float(sum(logs[n - 1 + j, token] for j, token in enumerate(TARGET)))

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


def test_a_fact_without_its_subject_is_refused() -> None:
    with pytest.raises(SourceError, match="does not occur"):
        fact(byte_tokenizer(), "Is Rome big?", "Paris", TARGET, BEFORE)


def test_contexts_stand_before_the_prompt_and_the_key_moves_with_them() -> None:
    tokenizer = byte_tokenizer()
    found: Fact = fact(tokenizer, "Is Rome big?", "Rome", TARGET, BEFORE)
    for before, (tokens, at) in zip(BEFORE, found.texts, strict=True):
        assert tokenizer.decode(tokens) == before + "Is Rome big?"
        assert tokenizer.decode(tokens[: at + 1]) == before + "Is Rome"
    assert tokenizer.decode(found.essence[0]) == "Rome is a"
    assert tokenizer.decode(found.essence[0][: found.essence[1] + 1]) == "Rome"
