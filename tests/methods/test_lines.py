"""LiNeS: lambda(l) = alpha + beta (l - 1) / (L - 1), blocks counted stack by stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import mergekit_ft
from mergekit_ft.contract import CELL
from mergekit_ft.errors import MergekitError
from mergekit_ft.layers import places
from mergekit_ft.methods.lines import Lines
from tests.checkpoints import write_checkpoint
from tests.merging import Case, vectors

LLAMA = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)),
    "model.norm.weight",
    "lm_head.weight",
]


def factors(names: list[str], **parameters: Any) -> dict[str, float]:
    operator = Lines.model_validate(parameters)
    return {name: operator.factor(name, place) for name, place in places(names).items()}


def by_layer(names: list[str], **parameters: Any) -> list[float]:
    found = factors(names, **parameters)
    return [found[name] for name in names if "layers" in name]


# --- the line -----------------------------------------------------------------------------------


def test_four_blocks_lie_on_a_line_from_alpha_to_alpha_plus_beta() -> None:
    # 0.2 + 0.6 * (0, 1/3, 2/3, 1)
    assert by_layer(LLAMA, alpha=0.2, beta=0.6) == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_a_single_block_is_the_last() -> None:
    # L = 1 divides 0 by 0 in the formula; here it is alpha + beta
    assert by_layer(["model.layers.0.w"], alpha=0.25, beta=0.5) == [0.75]


def test_gamma_is_short_for_alpha_gamma_and_beta_one_minus_gamma() -> None:
    # 0.4 + 0.6 * (0, 1/3, 2/3, 1)
    assert by_layer(LLAMA, gamma=0.4) == pytest.approx([0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("gamma", [i / 10 for i in range(11)])
def test_with_any_gamma_the_last_block_is_the_tuned_one_itself(gamma: float) -> None:
    assert by_layer(LLAMA, gamma=gamma)[-1] == 1.0


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"alpha": 0.5},
        {"beta": 0.5},
        {"gamma": 0.5, "beta": 0.5},
        {"gamma": 0.5, "alpha": 0.5, "beta": 0.5},
    ],
)
def test_the_line_is_given_once_and_whole(given: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="either alpha and beta, or gamma alone"):
        Lines.model_validate(given)


# --- where a block is ---------------------------------------------------------------------------


def test_an_encoder_and_a_decoder_are_two_stacks() -> None:
    names = [f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight" for i in range(3)]
    names += [f"decoder.block.{i}.layer.2.DenseReluDense.wo.weight" for i in range(2)]
    found = list(factors(names, alpha=0.0, beta=1.0).values())
    assert found == [0.0, 0.5, 1.0, 0.0, 1.0]


def test_an_expert_has_the_depth_of_its_layer() -> None:
    names = [f"model.layers.{i}.block_sparse_moe.experts.{e}.w1" for i in range(3) for e in (0, 7)]
    assert by_layer(names, alpha=0.0, beta=1.0) == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]


def test_a_name_that_starts_with_its_number_is_in_a_block() -> None:
    names = [f"{i}.weight" for i in range(3)]
    assert list(factors(names, alpha=0.0, beta=1.0).values()) == [0.0, 0.5, 1.0]


# The released code takes the first i of 0 .. L-1 whose ".i." is anywhere in the name.
def test_compat_finds_a_sub_layer_of_t5_before_its_block() -> None:
    names = [f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight" for i in range(6)]
    # block 0 has ".0.", all others the ".1." of the sub-layer: 1/5
    expected = [0.0, 0.2, 0.2, 0.2, 0.2, 0.2]
    found = list(factors(names, alpha=0.0, beta=1.0, compat=True).values())
    assert found == pytest.approx(expected)


def test_compat_takes_an_expert_of_mixtral_for_its_layer() -> None:
    names = [
        f"model.layers.{i}.block_sparse_moe.experts.{e}.w1" for i in range(8) for e in range(4)
    ]
    found = factors(names, alpha=0.0, beta=1.0, compat=True)
    last = [found[name] for name in names if ".layers.7." in name]
    assert last == pytest.approx([0.0, 1 / 7, 2 / 7, 3 / 7])


def test_compat_does_not_find_a_number_without_a_dot_before_it() -> None:
    names = [f"{i}.weight" for i in range(3)]
    assert list(factors(names, alpha=0.25, beta=1.0, compat=True).values()) == [0.25] * 3


def test_compat_is_the_formula_on_the_names_of_a_llama() -> None:
    plain = factors(LLAMA, alpha=0.2, beta=0.6)
    assert factors(LLAMA, alpha=0.2, beta=0.6, compat=True) == plain


# --- outside the blocks -------------------------------------------------------------------------


def test_what_is_in_no_block_gets_alpha() -> None:
    found = factors(LLAMA, alpha=0.25, beta=0.5)
    assert {found[name] for name in LLAMA if "layers" not in name} == {0.25}


@pytest.mark.parametrize(
    ("word", "name"), [("embed", LLAMA[0]), ("norm", LLAMA[-2]), ("head", LLAMA[-1])]
)
@pytest.mark.parametrize(
    ("policy", "factor"), [("alpha", 0.25), ("last", 0.75), ("keep", 1.0), ("zero", 0.0)]
)
def test_a_policy_is_for_its_own_tensors_alone(
    word: str, name: str, policy: str, factor: float
) -> None:
    plain = factors(LLAMA, alpha=0.25, beta=0.5)
    assert factors(LLAMA, alpha=0.25, beta=0.5, **{word: policy}) == plain | {name: factor}


def test_a_norm_inside_a_block_follows_the_line() -> None:
    names = [f"model.layers.{i}.input_layernorm.weight" for i in range(3)]
    assert by_layer(names, alpha=0.0, beta=1.0, norm="keep") == [0.0, 0.5, 1.0]


# --- alone, on one tuned model ------------------------------------------------------------------


def test_the_delta_is_scaled_by_the_factor() -> None:
    # the second of three blocks: 0.5 + 0.5 * 1/2 = 0.75; 1 + 0.75 * 4 and -2 + 0.75 * -8
    names = [f"layers.{i}.w" for i in range(3)]
    place = places(names)[names[1]]
    case = Case(Lines(alpha=0.5, beta=0.5), [1.0, -2.0], [5.0, -10.0], name=names[1], place=place)
    assert case.values().tolist() == [4.0, -8.0]


def test_a_factor_of_1_copies_the_tuned_model_and_of_0_the_base() -> None:
    where = places(LLAMA)
    operator = Lines(alpha=0.0, beta=1.0, head="keep")
    copied = [operator.copies(1, name, where[name]) for name in LLAMA]
    assert copied == [-1, -1, None, None, 0, -1, 0]


def test_blocks_merge_to_the_float64_reference() -> None:
    names = [f"layers.{i}.w" for i in range(4)]
    base, tuned = vectors(1, 2 * CELL + 100)
    where = places(names)[names[2]]
    case = Case(Lines(alpha=0.1, beta=0.7), base, tuned, name=names[2], place=where)
    torch.testing.assert_close(case.merged().double(), case.reference(), rtol=0, atol=1e-6)


# --- after a merge ------------------------------------------------------------------------------


def merge(
    folder: Path, method: str, deltas: list[list[float]], lines: dict[str, Any], **parameters: Any
) -> list[float]:
    """Return the merged delta of three blocks of one element, on a base of zeros."""
    names = [f"model.layers.{i}.w" for i in range(3)]
    zeros = {name: torch.zeros(1) for name in names}
    models = []
    for number, values in enumerate(deltas):
        tensors = {name: torch.tensor([float(v)]) for name, v in zip(names, values, strict=True)}
        models.append({"model": str(write_checkpoint(folder / f"m{number}", tensors, config={}))})
    plan = {
        "merge_method": method,
        "base_model": str(write_checkpoint(folder / "base", zeros, config={})),
        "models": models,
        "parameters": parameters,
        "then": [{"lines": lines}],
    }
    with mergekit_ft.open_plan(plan) as merged:
        return [float(merged[name]) for name in names]


def test_it_scales_a_merged_delta(tmp_path: Path) -> None:
    # sums 3, 6, 9 times 0.5, 0.75, 1
    found = merge(tmp_path, "task_arithmetic", [[1, 2, 3], [2, 4, 6]], {"gamma": 0.5}, weight=1.0)
    assert found == [1.5, 4.5, 9.0]


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_alpha_auto_makes_the_first_block_of_a_sum_the_mean(tmp_path: Path, weight: float) -> None:
    # Of a plain sum alpha is 1/T: block 1 has (3 + 6 - 3) / 3 = 2, beta 0 leaves all on the mean.
    # Half the weight doubles alpha: |alpha tau| does not depend on how tau is normalised.
    deltas: list[list[float]] = [[3, 1, -1], [6, 2, -2], [-3, 3, 6]]
    found = merge(
        tmp_path, "task_arithmetic", deltas, {"alpha": "auto", "beta": 0.0}, weight=weight
    )
    assert found == pytest.approx([2.0, 2.0, 1.0])


def test_alpha_auto_rises_by_beta_at_the_last_block(tmp_path: Path) -> None:
    # alpha = 1/2 for T = 2; 0.5, 0.75, 1 times the sums 4, 8, 2
    deltas: list[list[float]] = [[1, 6, 1], [3, 2, 1]]
    found = merge(tmp_path, "task_arithmetic", deltas, {"alpha": "auto", "beta": 0.5}, weight=1.0)
    assert found == pytest.approx([2.0, 6.0, 2.0])


def test_alpha_auto_compares_the_untrimmed_sum_with_the_merged_delta(tmp_path: Path) -> None:
    # raw sums (4 - 1, 2 + 2, 1 - 5) = (3, 4, -4): norm 11. TIES merges (4, (2 + 2) / 2, -5):
    # norm 11. So alpha = 11 / 11 / 2 = 0.5.
    deltas: list[list[float]] = [[4, 2, 1], [-1, 2, -5]]
    found = merge(tmp_path, "ties", deltas, {"alpha": "auto", "beta": 0.0}, weight=1.0)
    assert found == pytest.approx([2.0, 1.0, -2.5])


def test_alpha_auto_of_a_merge_that_is_the_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MergekitError, match="which is zero"):
        merge(
            tmp_path,
            "task_arithmetic",
            [[1, 2, 3], [-1, -2, -3]],
            {"alpha": "auto", "beta": 0.5},
            weight=1.0,
        )


def test_alpha_auto_of_what_is_no_number_is_refused(tmp_path: Path) -> None:
    for value in (float("inf"), float("nan")):
        with pytest.raises(MergekitError, match="holds NaN or Inf"):
            auto: dict[str, Any] = {"alpha": "auto", "beta": 0.5}
            merge(tmp_path / str(value), "task_arithmetic", [[1, value, 3]], auto, weight=1.0)


def test_two_lines_multiply(tmp_path: Path) -> None:
    # under then: each works on what the one before it made: 2 * (0.5, 0.75, 1) * (0, 0.5, 1)
    names = [f"model.layers.{i}.w" for i in range(3)]
    for folder, value in (("base", 0.0), ("tuned", 2.0)):
        tensors = {name: torch.full((1,), value) for name in names}
        write_checkpoint(tmp_path / folder, tensors, config={})
    plan = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "tuned")}],
        "parameters": {"weight": 1.0},
        "then": [{"lines": {"gamma": 0.5}}, {"lines": {"gamma": 0.0}}],
    }
    with mergekit_ft.open_plan(plan) as merged:
        assert [float(merged[name]) for name in names] == [0.0, 0.75, 2.0]
