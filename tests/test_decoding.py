"""Greedy decoding of many prompts at once, against transformers' own generate()."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
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
    LlamaConfig,
    LlamaForCausalLM,
)

from examples.two_experts.tiny import byte_tokenizer
from mergekit_ft.errors import OperatorError, SourceError
from mergekit_ft.models.decoding import Stop, answers, padded, sampled
from mergekit_ft.models.speaker import ModelSpeaker

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPTS = [[5, 9, 12], [7], [30, 31, 32, 33, 34, 35], [8, 8], [40, 41, 42, 43]]


def model(kind: str, size: int) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(vocab_size=size, intermediate_size=48, **SHAPE))
    if kind == "gpt2":  # learned positions: padding on the left must not shift them
        config: Any = GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4)
        return GPT2LMHeadModel(config)
    if kind == "bloom":  # takes no position_ids
        return BloomForCausalLM(BloomConfig(vocab_size=size, hidden_size=32, n_layer=2, n_head=4))
    gemma = Gemma2Config(
        vocab_size=size, intermediate_size=48, head_dim=8, num_key_value_heads=2, sliding_window=3,
        **SHAPE,
    )  # fmt: skip
    return Gemma2ForCausalLM(gemma)


def speaker(kind: str = "llama") -> ModelSpeaker:
    tokenizer = byte_tokenizer()
    made = model(kind, len(tokenizer))
    made.generation_config.eos_token_id = tokenizer.eos_token_id
    return ModelSpeaker(made, tokenizer)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "gemma2"])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_answers_are_those_of_generate_one_prompt_at_a_time(kind: str, batch: int) -> None:
    who = speaker(kind)
    found = dict(answers(who, PROMPTS, Stop(most=9), batch=batch))
    assert sorted(found) == [0, 1, 2, 3, 4]
    for i, prompt in enumerate(PROMPTS):
        model: Any = who.model
        said = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=9, pad_token_id=0
        )
        assert list(found[i].tokens) == said[0, len(prompt) :].tolist()


def test_logits_of_a_padded_batch_are_those_of_each_row_alone() -> None:
    who = speaker("gpt2")
    together = who.read(*padded(PROMPTS, 0, left=False))
    for i, prompt in enumerate(PROMPTS):
        alone = who.read(*padded([prompt], 0, left=False))
        assert torch.allclose(together[i, : len(prompt)], alone[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "gemma2"])
def test_logits_of_some_places_are_those_among_all(kind: str) -> None:
    who = speaker(kind)
    tokens, mask = padded(PROMPTS, 0, left=False)
    at = mask.bool() & (tokens % 2 == 0)
    model: Any = who.model
    everything = model(input_ids=tokens, attention_mask=mask).logits
    assert torch.allclose(who.read(tokens, mask, at), everything[at], atol=1e-6)
    assert who.read(tokens, mask, at).shape == (int(at.sum()), who.vocabulary)
    assert torch.equal(who.read(tokens, mask), everything)


class Scripted:
    """Says what a script says, whatever the prompt: row i its i-th text."""

    most = None

    def __init__(self, script: list[str]) -> None:
        self.tokenizer = byte_tokenizer()
        self.ends = frozenset([int(self.tokenizer.eos_token_id)])
        end = int(self.tokenizer.eos_token_id)
        self.lines = [
            [*self.tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in script
        ]
        self.sizes: list[int] = []  # of the batch, at each step

    def read(self, tokens: Tensor, mask: Tensor, at: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def begin(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        which = tokens[:, -1].tolist()  # a prompt ends in the number of its line
        return self._say([(i, 0) for i in which])

    def step(self, state: Any, tokens: Tensor) -> tuple[Tensor, Any]:
        return self._say([(i, at + 1) for i, at in state])

    def keep(self, state: Any, rows: Tensor) -> Any:
        return [state[i] for i in rows.tolist()]

    def _say(self, state: list[tuple[int, int]]) -> tuple[Tensor, Any]:
        self.sizes.append(len(state))
        logits = torch.zeros(len(state), len(self.tokenizer))
        for row, (i, at) in enumerate(state):
            logits[row, self.lines[i][at]] = 1.0
        return logits, state


def test_an_answer_ends_at_its_token_before_a_string_or_at_the_bound() -> None:
    who = Scripted(["Paris", "in Rome. It is", "a very long answer", "two\nlines"])
    stop = Stop((".", "\n"), most=10)
    found = dict(answers(who, [[0], [1], [2], [3]], stop))
    assert [(found[i].text, found[i].ended) for i in range(4)] == [
        ("Paris", "token"),
        ("in Rome", "string"),
        ("a very lon", "length"),
        ("two", "string"),
    ]


def test_a_row_that_has_ended_leaves_the_batch() -> None:
    who = Scripted(["ab", "abcd"])
    dict(answers(who, [[0], [1]], Stop(most=10)))
    assert who.sizes == [2, 2, 2, 1, 1]  # "ab" and its end are three tokens


def test_the_earliest_of_several_strings_ends_an_answer() -> None:
    who = Scripted(["one.\ntwo"])
    found = dict(answers(who, [[0]], Stop(("\n", ".")), batch=1))
    assert found[0].text == "one"


def test_a_prompt_that_is_empty_or_too_long_is_refused_by_its_number() -> None:
    who = speaker()
    who.most = 8
    with pytest.raises(SourceError, match="prompt 2: no token"):
        dict(answers(who, [[1], []], Stop(most=2)))
    with pytest.raises(SourceError, match="prompt 1: 7 tokens and an answer of 2 do not fit"):
        dict(answers(who, [[1] * 7], Stop(most=2)))


def test_logits_that_are_not_numbers_are_an_error() -> None:
    who = speaker()
    with torch.no_grad():
        next(iter(who.model.parameters())).fill_(float("nan"))
    with pytest.raises(OperatorError, match="not numbers"):
        dict(answers(who, [[1, 2]], Stop(most=2)))
    with pytest.raises(OperatorError, match="not numbers"):
        who.read(*padded([[1, 2]], 0, left=False))


def test_draws_repeat_with_their_seed_and_follow_the_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 3.0]).repeat(20_000, 1)
    one = sampled(2.0, torch.Generator().manual_seed(3))(logits)
    same = sampled(2.0, torch.Generator().manual_seed(3))(logits)
    assert torch.equal(one, same)
    shares = torch.bincount(one, minlength=3) / len(one)
    expected = torch.softmax(torch.tensor([0.0, 0.5, 1.5]), 0)
    assert torch.allclose(shares, expected, atol=0.015)


def test_every_end_token_of_the_generation_config_ends_an_answer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    made = model("llama", len(tokenizer))
    made.generation_config = SimpleNamespace(eos_token_id=[3, 4])
    assert ModelSpeaker(made, tokenizer).ends == {3, 4, int(tokenizer.eos_token_id)}
