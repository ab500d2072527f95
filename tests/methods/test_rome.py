"""ROME: the matrix answers an edit's key with its value, by the least change that text notices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.small_models import models  # noqa: F401
from tests.solved import ASKED, Seen, given, module_of, near, opened, run, second_moment

__all__ = ["given"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_after_rome_the_matrix_answers_the_averaged_key_with_the_value(
    kind: str, tmp_path: Path, given: dict[int, Tensor]
) -> None:
    base = opened(tmp_path, kind)
    found = run("rome", base, tmp_path, ASKED[:1], layers=(1,), covariance=kind != "gpt2")
    texts = Seen(base, found.facts["contexts"])
    assert len(texts.contexts) == 21
    (name,) = found.held
    module = module_of(base, name)
    assert torch.equal(found.held[name], module.weight)
    key = texts.key(module, ASKED[0], 1 / 21).float()
    with torch.no_grad():
        said = module(key[None])[0].double()
    assert near(said, given[0][:, 0], 1e-6)


def test_romes_update_is_the_textbooks_and_the_next_edit_sees_it(
    tmp_path: Path, given: dict[int, Tensor]
) -> None:
    base, fresh = opened(tmp_path, "llama"), opened(tmp_path, "llama")
    found = run("rome", base, tmp_path, layers=(1,))
    (name,) = found.held
    texts, module = Seen(fresh, found.facts["contexts"]), module_of(fresh, name)
    inverse = torch.linalg.inv(second_moment(fresh, module, tmp_path))
    for number, edit in enumerate(ASKED):
        key = texts.key(module, edit, 1 / 21)
        u = inverse @ key / (inverse @ key).norm()
        left = given[number][:, 0] - module.weight.double() @ key
        with torch.no_grad():
            module.weight += (torch.outer(left, u) / (u @ key)).float()
    assert near(found.held[name].double(), module.weight.double(), 1e-5)
