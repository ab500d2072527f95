"""A pack: one vector, a bit an entry and a number for each task, and every task's model again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_ft.deltas.packing import pack
from mergekit_ft.deltas.putting import apply
from mergekit_ft.deltas.unpacking import unpack, unpack_delta
from mergekit_ft.errors import OperatorError, PlanError, SourceError
from mergekit_ft.sources.delta_file import open_delta
from tests.checkpoints import write_checkpoint
from tests.small_models import CONFIG, cli, models, weights

__all__ = ["models"]

NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
TASKS = {"maths": "maths", "chat": "chat"}
TIED = CONFIG | {"tie_word_embeddings": True}
PACK = "p.safetensors"


def by_hand(dtype: torch.dtype = torch.float32, **rows: list[float]) -> None:
    """Write models that differ from ./base in the final norm alone, which is 0 there."""
    base = weights(0, dtype=dtype) | {NORM: torch.zeros(8, dtype=dtype)}
    write_checkpoint(Path("base"), base, config=CONFIG)
    for name, row in rows.items():
        tuned = base | {NORM: torch.tensor(row, dtype=dtype)}
        write_checkpoint(Path(name), tuned, config=CONFIG)


def parts(path: str = PACK) -> tuple[list[float], list[list[int]]]:
    """Return the vector and the masks of the final norm, which alone may be in the pack."""
    assert list(open_delta(Path(path)).changes) == [NORM]
    held = load_file(path)
    bits = np.unpackbits(held[f"{NORM}:masks"].numpy(), axis=1, bitorder="little")
    return held[f"{NORM}:unified"].tolist(), bits.tolist()


def words_of(path: str = PACK) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["delta"]))


def test_emr_elects_a_sign_takes_the_largest_and_rescales() -> None:
    by_hand(
        maths=[1.0, -4.0, 2.0, 0.0, 3.0, 0.0, 0.0, 0.0],
        chat=[3.0, 1.0, -2.0, 0.0, 3.0, -1.0, 0.0, 0.0],
    )
    made = pack("base", TASKS, PACK)
    # means 2, -1.5, 0, 0, 3, -0.5: signs + - - - + -
    unified, masks = parts()
    assert unified == [3.0, -4.0, -2.0, 0.0, 3.0, -1.0, 0.0, 0.0]
    assert masks == [[1, 1, 0, 0, 1, 0, 0, 0], [1, 0, 1, 0, 1, 1, 0, 0]]
    # |d_t| 10 and 10; kept |d| 3 + 4 + 3 and 3 + 2 + 3 + 1
    assert made.scales == {"maths": 10 / 10, "chat": 10 / 9}
    assert made.shares == {"maths": 3 / 8, "chat": 4 / 8}
    unpack(PACK, "chat", "out", base="base")
    wanted = torch.tensor([3.0, 0.0, -2.0, 0.0, 3.0, -1.0, 0.0, 0.0]) * (10 / 9)
    assert torch.equal(load_file("out/model.safetensors")[NORM], wanted)


def test_tall_masks_keep_what_a_task_needs_of_the_sum() -> None:
    by_hand(
        maths=[4.0, 0.1, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        chat=[0.1, 4.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    )
    made = pack("base", TASKS, PACK, method="tall", threshold=0.5)
    unified, masks = parts()
    assert unified[:3] == pytest.approx([4.1, 4.1, 2.0])
    # 4 > 0.5 * 0.1, 0.1 > 0.5 * 4 not, 1 > 0.5 * 1
    assert masks == [[1, 0, 1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0]]
    assert made.scales == {"maths": 1.0, "chat": 1.0}


def test_the_numbers_are_over_the_whole_model_not_means_of_tensors() -> None:
    base = weights(0) | {NORM: torch.zeros(8), HEAD: torch.zeros(16, 8)}
    write_checkpoint(Path("base"), base, config=CONFIG)
    for name, one, other in (("maths", 1.0, 3.0), ("chat", 2.0, 1.0)):
        tuned = base | {NORM: torch.full((8,), one), HEAD: torch.full((16, 8), other)}
        write_checkpoint(Path(name), tuned, config=CONFIG)
    # d is 2 in the 8 entries of the norm and 3 in the 128 of the head; all masks are whole
    made = pack("base", TASKS, PACK)
    kept = 8 * 2 + 128 * 3
    assert made.scales == {"maths": (8 * 1 + 128 * 3) / kept, "chat": (8 * 2 + 128 * 1) / kept}


def emr(base: Tensor, tuned: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the vector and the masks in float64, by the formula."""
    deltas = torch.stack([(t.double() - base.double()) for t in tuned])
    sign = torch.where(deltas.mean(0) > 0, 1.0, -1.0).double()
    masks = [delta * sign > 0 for delta in deltas]
    largest = torch.stack([d.abs() * m for d, m in zip(deltas, masks, strict=True)]).amax(0)
    return sign * largest, masks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_task_comes_out_as_the_formula_says_rounded_once(dtype: torch.dtype) -> None:
    held = {name: weights(seed, dtype=dtype) for seed, name in enumerate(("base", *TASKS))}
    for name, tensors in held.items():
        write_checkpoint(Path(name), tensors, config=CONFIG)
    made = pack("base", TASKS, PACK)
    plain: dict[str, tuple[Tensor, list[Tensor]]] = {}
    own, kept = [0.0, 0.0], [0.0, 0.0]
    for name, base in held["base"].items():
        unified, masks = emr(base, [held[task][name] for task in TASKS])
        unified = unified.to(dtype).double()  # as it is stored
        plain[name] = unified, masks
        for i, task in enumerate(TASKS):
            own[i] += float((held[task][name].double() - base.double()).abs().sum())
            kept[i] += float((unified.abs() * masks[i]).sum())
    half = torch.finfo(dtype).eps / 2  # of a power of two
    digits = 2.0**-50 if dtype == torch.float64 else 2.0**-22  # of the arithmetic
    for i, task in enumerate(TASKS):
        assert made.scales[task] == pytest.approx(own[i] / kept[i], rel=1e-6)
        unpack(PACK, task, f"out-{task}", base="base")
        out = load_file(f"out-{task}/model.safetensors")
        for name, base in held["base"].items():
            unified, masks = plain[name]
            change = masks[i] * unified * made.scales[task]
            wanted = base.double() + change
            rounding = half * torch.exp2(torch.log2(out[name].double().abs()).floor())
            beyond = (out[name].double() - wanted).abs() - 1.001 * rounding
            assert bool((beyond <= digits * (base.double().abs() + change.abs())).all())
            assert torch.equal(out[name][~masks[i]], base[~masks[i]])


@pytest.mark.parametrize("method", ["emr", "tall"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_task_alone_is_its_own_model_up_to_rounding(method: Any, dtype: torch.dtype) -> None:
    for seed, name in enumerate(("base", "maths")):
        write_checkpoint(Path(name), weights(seed, dtype=dtype), config=CONFIG)
    pack("base", {"maths": "maths"}, PACK, method=method)
    unpack(PACK, "maths", "out", base="base")
    base, made, wanted = (load_file(f"{n}/model.safetensors") for n in ("base", "out", "maths"))
    for name in wanted:  # d is rounded once, and the sum once
        sizes = base[name].double().abs() + wanted[name].double().abs()
        off = (made[name].double() - wanted[name].double()).abs()
        assert bool((off <= torch.finfo(dtype).eps * sizes).all())


@pytest.mark.parametrize("method", ["emr", "tall"])
def test_neither_memory_nor_threads_move_a_byte(method: Any) -> None:
    for seed, name in enumerate(("base", *TASKS)):  # tensors of two and three cells
        write_checkpoint(Path(name), weights(seed, width=257, layers=1), config=CONFIG)
    found = set()
    for memory, threads in ((1 << 24, 1), (1 << 26, 3), (1 << 30, 2)):
        options = {"memory": memory, "threads": threads, "overwrite": True}
        pack("base", TASKS, PACK, method=method, **options)
        found.add(Path(PACK).read_bytes())
    assert len(found) == 1


def test_a_budget_that_does_not_do_is_refused() -> None:
    with pytest.raises(OperatorError, match=r"need at least .* raise --memory"):
        pack("base", TASKS, PACK, memory=1 << 20)
    assert not list(Path().glob("p.*"))


def test_a_task_stands_in_a_plan() -> None:
    pack("base", TASKS, PACK)
    text = (
        "merge_method: linear\nparameters: {weight: 0.5}\nmodels:\n"
        "  - {model: base, delta: {path: p.safetensors, task: maths}}\n"
        "  - {model: base, delta: {path: p.safetensors, task: chat}}\n"
    )
    assert cli("merge", "-", "out", text=text).exit_code == 0
    assert cli("verify", "out").exit_code == 0


def test_a_task_may_be_any_model_that_a_plan_can_name() -> None:
    assert cli("delta", "extract", "base", "maths", "d.safetensors").exit_code == 0
    made = pack("base", {"maths": "{model: base, delta: d.safetensors}", "chat": "chat"}, PACK)
    assert made.scales == pack("base", TASKS, "q.safetensors").scales
    one, other = load_file(PACK), load_file("q.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_tasks_of_one_name_a_threshold_of_emr_and_no_tasks_are_refused() -> None:
    for words in (["maths"], ["=maths"], ["maths="], ["m=maths", "m=chat"]):
        assert cli("delta", "pack", "base", *words, PACK).exit_code == 2
    result = cli("delta", "pack", "base", "maths=maths", PACK, "--threshold", "0.3")
    assert result.exit_code == 2 and "--method tall" in result.stderr
    with pytest.raises(PlanError, match="no effect with emr"):
        pack("base", TASKS, PACK, threshold=0.3)
    with pytest.raises(PlanError, match="at least one"):
        pack("base", {}, PACK)


# ---- tied weights, and tensors that do not fit


def test_a_head_of_its_own_that_the_base_ties_is_not_lost() -> None:
    base = {name: tensor for name, tensor in weights(0).items() if name != HEAD}
    write_checkpoint(Path("base"), base, config=TIED)
    with pytest.raises(SourceError, match=r"lm_head\.weight of its own.*would be lost"):
        pack("base", {"maths": "maths"}, PACK)
    pack("base", {"maths": "maths"}, PACK, exclude=[HEAD])
    assert words_of()["parameters"] == {"exclude": [HEAD]}


def test_tied_weights_that_lie_twice_in_the_base_change_together() -> None:
    for seed, name in enumerate(("base", "maths")):
        made = weights(seed)
        write_checkpoint(Path(name), made | {HEAD: made[EMBEDDING].clone()}, config=TIED)
    packed = pack("base", {"maths": "maths"}, PACK)
    unpack(PACK, "maths", "out", base="base")
    out, wanted = load_file("out/model.safetensors"), load_file("maths/model.safetensors")
    assert torch.equal(out[HEAD], out[EMBEDDING])
    assert torch.allclose(out[HEAD], wanted[HEAD], atol=1e-6)
    assert packed.scales == {"maths": 1.0}


def test_models_that_lack_tensors_or_have_others_are_told_by_name_all_at_once() -> None:
    held = load_file("chat/model.safetensors")
    del held[NORM]
    save_file(held, "chat/model.safetensors", {"format": "pt"})
    held = load_file("maths/model.safetensors") | {"more": torch.ones(2), HEAD: torch.ones(3, 8)}
    save_file(held, "maths/model.safetensors", {"format": "pt"})
    told = r"(?s)maths: lm_head\.weight is of shape.*maths: more is new.*chat lacks 1.*model\.norm"
    with pytest.raises(SourceError, match=told):
        pack("base", TASKS, PACK)
    assert not list(Path().glob("p.*"))


def test_what_holds_no_floats_must_be_the_same() -> None:
    for seed, name in enumerate(("base", *TASKS)):
        more = {"steps": torch.tensor([1, 2, 3 if name == "chat" else 2])}
        write_checkpoint(Path(name), weights(seed, **more), config=CONFIG)
    pack("base", {"maths": "maths"}, PACK)
    assert "steps" not in words_of()["tensors"]
    with pytest.raises(SourceError, match=r"chat: steps \(I64\) differs"):
        pack("base", TASKS, "q.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(bad: float) -> None:
    by_hand(maths=[1.0] * 7 + [bad], chat=[1.0] * 8)
    with pytest.raises(OperatorError, match=r"maths or base: model\.norm\.weight holds NaN or Inf"):
        pack("base", TASKS, PACK)
    assert not list(Path().glob("p.*"))


def test_a_vector_that_the_dtype_cannot_hold_is_refused() -> None:
    by_hand(torch.float16, maths=[60000.0] * 8, chat=[60000.0] * 8)
    with pytest.raises(OperatorError, match=r"model\.norm\.weight: .* too large for F16"):
        pack("base", TASKS, PACK, method="tall")
    pack("base", TASKS, PACK)  # EMR takes the larger of the two


def test_models_that_change_nothing_are_refused_and_one_of_them_keeps_the_base() -> None:
    by_hand(maths=[0.0] * 8, chat=[1.0] * 8)
    with pytest.raises(OperatorError, match="nothing changed"):
        pack("base", {"maths": "maths"}, PACK)
    assert pack("base", TASKS, PACK).scales == {"maths": 0.0, "chat": 1.0}


def test_a_task_of_which_nothing_is_left_is_refused() -> None:
    by_hand(maths=[-1.0] * 8, chat=[3.0] * 8)  # the mean is +: nothing of maths has its sign
    with pytest.raises(OperatorError, match="maths: nothing of what it changes"):
        pack("base", TASKS, PACK)


# ---- packs that are not what they should be


def test_another_base_is_refused() -> None:
    pack("base", TASKS, PACK)
    with pytest.raises(SourceError, match="has SHA-256"):
        unpack(PACK, "maths", "out", base="chat")
    assert not Path("out").exists()


def test_an_unknown_task_is_told_with_the_nearest() -> None:
    pack("base", TASKS, PACK)
    told = "has no task 'math'; did you mean 'maths'? (tasks: maths, chat)"
    for words in (("out", "--base", "base"), ("out.safetensors",)):
        result = cli("delta", "unpack", PACK, "math", *words)
        assert result.exit_code in (3, 4) and told in result.stderr
    result = cli("delta", "apply", "base", PACK, "out")
    assert result.exit_code in (3, 4) and "is a pack of 2 tasks: name one" in result.stderr


Harm = Callable[[dict[str, Any], dict[str, Tensor]], object]


def _every(key: str, value: Any) -> Harm:
    return lambda words, _: [r.__setitem__(key, value) for r in words["tensors"].values()]


def _without_tasks(words: dict[str, Any], held: dict[str, Tensor]) -> None:
    del words["tasks"], words["scales"]
    for name in held:
        if name.endswith(":masks"):
            held[name] = held[name][:0].clone()


def _replace(part: str, change: Callable[[Tensor], Tensor]) -> Harm:
    return lambda _, held: held.__setitem__(f"{NORM}:{part}", change(held[f"{NORM}:{part}"]))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (_replace("masks", lambda t: t[:, :0].clone()), "2 tasks of 8 bits need [2, 1]"),
        (_replace("masks", lambda t: t[:1].clone()), "2 tasks of 8 bits need [2, 1]"),
        (_replace("masks", lambda t: t.short()), "not rows of bytes"),
        (_replace("unified", lambda t: t[:7].clone()), "its unified vector is F32 [7]"),
        (_replace("unified", lambda t: t.int()), "its unified vector is I32 [8]"),
        (_without_tasks, "it has masks, and names no tasks"),
        (_every("sha256", None), "the SHA-256 of the base tensor is not recorded"),
        (_every("entries", 7), "7 entries are recorded"),
        (_every("dtype", "I32"), "cannot be added to I32"),
        (lambda words, _: words["scales"].pop(), "it names 2 tasks and 1 scales"),
        (lambda words, _: words.update(tasks=["a", "a"]), "must be different names"),
        (lambda words, _: words.update(scales=[1.0, float("nan")]), "its `scales` numbers"),
        (lambda words, _: words.update(scales=[1.0, 10**400]), "its `scales` numbers"),
        (lambda words, _: words.update(scales=[1.0, True]), "its `scales` numbers"),
    ],
)
def test_a_pack_that_does_not_agree_with_itself_is_refused_unread(harm: Harm, told: str) -> None:
    by_hand(maths=[1.0] * 8, chat=[2.0] * 8)
    pack("base", TASKS, PACK)
    words, held = words_of(), load_file(PACK)
    harm(words, held)
    metadata = {"format": "mergekit-ft delta", "delta": json.dumps(words)}
    save_file(held, "harmed.safetensors", metadata)
    with pytest.raises(SourceError) as raised:
        unpack("harmed.safetensors", "maths", "out", base="base")
    assert told in str(raised.value)
    assert cli("delta", "info", "harmed.safetensors").exit_code in (3, 4)


def test_a_delta_that_is_no_pack_has_no_tasks() -> None:
    assert cli("delta", "extract", "base", "maths", "d.safetensors").exit_code == 0
    with pytest.raises(SourceError, match="is no pack, so it has no task 'maths'"):
        unpack_delta("d.safetensors", "maths", "out.safetensors")


# ---- a task as a delta


@pytest.mark.parametrize("method", ["emr", "tall"])
def test_the_delta_of_a_task_put_on_is_the_model_of_the_task(method: Any) -> None:
    for seed, name in enumerate(("base", *TASKS)):
        tensors = weights(seed, width=257, layers=1, dtype=torch.bfloat16)
        write_checkpoint(Path(name), tensors, config=CONFIG)
    pack("base", TASKS, PACK, method=method)
    made = unpack_delta(PACK, "maths", "maths.safetensors")
    delta = open_delta(Path("maths.safetensors"))
    assert made.tensors == len(delta.changes) == 6
    assert {c.kind for c in delta.changes.values()} == {"add"}
    unpack(PACK, "maths", "whole", base="base")
    apply("base", "maths.safetensors", "applied")
    model = Path("whole/model.safetensors").read_bytes()
    assert Path("applied/model.safetensors").read_bytes() == model
    unpack_delta(PACK, "chat", "chat.safetensors")
    both = ("maths.safetensors", "chat.safetensors=0.5", "both.safetensors")
    assert cli("delta", "compose", *both).exit_code == 0


def test_a_task_that_changes_nothing_is_no_delta() -> None:
    by_hand(maths=[0.0] * 8, chat=[1.0] * 8)
    pack("base", TASKS, PACK)
    with pytest.raises(OperatorError, match="task maths changes nothing"):
        unpack_delta(PACK, "maths", "out.safetensors")
    assert not list(Path().glob("out*"))


# ---- the command line


def test_the_command_line_packs_tells_and_unpacks() -> None:
    result = cli("delta", "pack", "base", "maths=maths", "chat=chat", PACK, "--json")
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    assert set(report["scales"]) == set(TASKS)
    whole = 2 * sum(t.nbytes for t in load_file("base/model.safetensors").values())
    assert report["dense"] == whole
    told: dict[str, Any] = json.loads(cli("delta", "info", PACK, "--json").stdout)
    assert (told["tasks"], told["shares"]) == (report["scales"], report["shares"])
    assert told["dense_bytes"] == whole and told["bytes"] == report["nbytes"]
    text = cli("delta", "info", PACK).stdout
    assert f"task maths: scale {report['scales']['maths']:.6g}, " in text
    assert "the tasks' own tensors take" in text
    assert cli("delta", "unpack", PACK, "chat", "out", "--base", "base").exit_code == 0
    result = cli("delta", "unpack", PACK, "chat", "chat.safetensors", "--json")
    assert json.loads(result.stdout)["tensors"] == 12


def test_words_without_effect_are_refused_where_a_task_is_unpacked() -> None:
    pack("base", TASKS, PACK)
    result = cli("delta", "unpack", PACK, "chat", "out")
    assert result.exit_code == 2 and "needs --base" in result.stderr
    result = cli("delta", "unpack", PACK, "chat", "d.safetensors", "--base", "base")
    assert result.exit_code == 2 and "--base has no effect" in result.stderr
    result = cli("delta", "unpack", PACK, "chat", "d.safetensors", "--threads", "2")
    assert result.exit_code == 2 and "--threads has no effect" in result.stderr
