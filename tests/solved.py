"""Small models that are edited, and the papers' equations over hooks on the whole of them."""

from __future__ import annotations

import json
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
from mergekit_ft import registry
from mergekit_ft.editing.encoding import Encoder
from mergekit_ft.editing.facts import Edit
from mergekit_ft.editing.memory import ModelMemory
from mergekit_ft.editing.rewritten import Rewritten
from mergekit_ft.editing.solving import solve
from mergekit_ft.models.opening import Base, open_base
from mergekit_ft.plan import ModelReference

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


WIDTH = 48
LINE = "Lima is the capital of Peru, and Anna knew it when she was born in Rome. "
ASKED = [Edit(f"edits.jsonl:{i + 1}", p, "()*", s) for i, (p, s) in enumerate(EDITS)]


def text(folder: Path, seed: int = 0, letters: int = 3000) -> Path:
    """Write letters by chance: a text that meets many directions."""
    dice = torch.Generator().manual_seed(seed)
    made = [chr(32 + int(c)) for c in torch.randint(0, 95, (letters,), generator=dice)]
    path = folder / "text.jsonl"
    rows = ["".join(made[i : i + 100]) for i in range(0, letters, 100)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def run(name: str, base: Base, folder: Path, edits: Any = None, **parameters: Any) -> Rewritten:
    editor = registry.of_kind(name, "editor")(**{"steps": 4, **parameters})
    asked = ASKED if edits is None else edits
    return solve(
        editor,
        base,
        Encoder(base.tokenizer),
        asked,
        text=text(folder),
        seed=0,
        say=lambda line: None,
    )


def second_moment(base: Base, module: Any, folder: Path) -> Tensor:
    """Return C, row by row of the text, through hooks on the whole model."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for line in text(folder).read_text().splitlines():
        row = tuple(base.tokenizer(json.loads(line)["text"])["input_ids"])
        keys = watched(base, module, row)[0]
        total = total + keys.T @ keys
        count += len(keys)
    return total / count


class Seen:
    """The texts of the edits, as a reader of the receipt would make them."""

    def __init__(self, base: Base, contexts: list[str]) -> None:
        self.base, self.contexts = base, ["", *contexts]

    def at(self, edit: Edit, context: str) -> tuple[tuple[int, ...], int]:
        whole = context + edit.prompt
        upto = whole[: whole.rindex(edit.subject) + len(edit.subject)]
        row = tuple(self.base.tokenizer(whole)["input_ids"])
        return row, len(self.base.tokenizer(upto)["input_ids"]) - 1  # bytes: a prefix

    def key(self, module: Any, edit: Edit, alone: float) -> Tensor:
        seen = []
        for context in self.contexts:
            row, at = self.at(edit, context)
            seen.append(watched(self.base, module, row)[0][at])
        return alone * seen[0] + (1 - alone) * torch.stack(seen[1:]).mean(dim=0)

    def value(self, module: Any, edit: Edit) -> Tensor:
        row, at = self.at(edit, "")
        return watched(self.base, module, row)[1][at]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[int, Tensor]:
    """Let the values that are wanted be near those there are, by chance, and keep them in order."""
    kept: dict[int, Tensor] = {}

    def wanted(self: ModelMemory, layer: int, part: Any, how: Any) -> Tensor:
        dice = torch.Generator().manual_seed(len(kept))
        now = self.values(layer, part)
        made = now + 0.3 * torch.randn(now.shape, generator=dice, dtype=torch.float64)
        kept[len(kept)] = made
        return made

    monkeypatch.setattr(ModelMemory, "wanted", wanted)
    return kept


def module_of(base: Base, name: str) -> Any:
    weight = base.parameters[name]
    return next(m for m in base.model.modules() if getattr(m, "weight", None) is weight)


def layer_of(base: Base, name: str) -> Any:
    module = module_of(base, name)
    path = next(path for path, found in base.model.named_modules() if found is module)
    return base.model.get_submodule(path.rsplit(".mlp", 1)[0])
