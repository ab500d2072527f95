"""Edits -> tokens: where a target begins, and what ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mergekit_ft.data.rows import UNSCORED, Sample
from mergekit_ft.editing.facts import Edit
from mergekit_ft.errors import PlanError, SourceError

Template = Literal["raw", "chat"]
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """A prompt and what is to be said after it."""

    prompt: Tokens
    target: Tokens  # what ends it included
    whole: bool = True  # prompt + target is how the text would be cut as one

    @property
    def sample(self) -> Sample:
        """Return it with every token of the target scored."""
        labels = (UNSCORED,) * len(self.prompt) + self.target
        return Sample(self.prompt + self.target, labels)


class Encoder:
    """Turns prompts and targets into tokens, by a model's tokenizer.

    `raw` joins them by a blank unless the target begins with one; `chat` writes a user's turn and
    the assistant's. A target ends with the token that ends a text, unless `eos` is off, or a turn.
    """

    def __init__(self, tokenizer: Any, template: Template = "raw", *, eos: bool = True) -> None:
        if template == "chat" and not tokenizer.chat_template:
            raise SourceError(
                "the model's tokenizer has no chat template; ask it by `raw`, or give the base one"
            )
        if template == "chat" and not eos:
            raise PlanError("eos has no effect in a chat: its template ends the turn")
        self.tokenizer, self.template, self.eos = tokenizer, template, eos
        self.end: int | None = tokenizer.eos_token_id

    def prompt(self, text: str) -> Tokens:
        """Return a prompt as the model is asked it."""
        if self.template == "chat":
            return self._turns([{"role": "user", "content": text}], opened=True)
        return self._tokens(text)

    def edit(self, edit: Edit) -> Encoded:
        """Return an edit's prompt and target; SourceError where there is no target."""
        return self.answered(edit.prompt, edit.target, edit.where)

    def answered(self, prompt: str, answer: str, where: str) -> Encoded:
        """Return a prompt and an answer to it."""
        if not answer.strip():
            raise SourceError(f"{where}: the target is empty, so there is nothing to say")
        asked = self.prompt(prompt)
        if self.template == "chat":
            return self._chat(prompt, answer, asked, where)
        text = spaced(answer)
        joint = self._tokens(prompt + text)
        whole = joint[: len(asked)] == asked and len(joint) > len(asked)
        alone = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        target = joint[len(asked) :] if whole else tuple(alone)
        ends = (int(self.end),) if self.eos and self.end is not None else ()
        return Encoded(asked, target + ends, whole)

    def _chat(self, prompt: str, answer: str, asked: Tokens, where: str) -> Encoded:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        both = self._turns(turns, opened=False)
        if both[: len(asked)] != asked:
            raise SourceError(
                f"{where}: the chat template writes the question otherwise once an answer follows, "
                "so where the answer begins is not sure; use the template raw"
            )
        return Encoded(asked, both[len(asked) :])

    def text(self, prompt: str) -> str:
        """Return a prompt as the text that becomes its tokens."""
        if self.template == "chat":
            return self._written([{"role": "user", "content": prompt}], opened=True)
        return prompt

    def _written(self, turns: Sequence[dict[str, str]], *, opened: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=opened
        )
        return text if opened else text.rstrip("\n")

    def _turns(self, turns: Sequence[dict[str, str]], *, opened: bool) -> Tokens:
        text = self._written(turns, opened=opened)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tokens(self, text: str) -> Tokens:
        """Return a text with what the tokenizer begins texts with, not with what it ends them."""
        tokens = tuple(self.tokenizer(text)["input_ids"])
        return tokens[:-1] if tokens and tokens[-1] == self.end else tokens


def spaced(target: str) -> str:
    """Return a target as it stands behind a prompt: a blank before it, unless it has one."""
    return target if target.startswith(" ") else f" {target}"
