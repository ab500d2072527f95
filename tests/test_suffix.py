"""Training by the layers above, against a loop over the whole model written out here."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_ft.editing.encoding import Encoder
from mergekit_ft.editing.facts import Edit
from mergekit_ft.editing.places import chosen, usual_layer
from mergekit_ft.editing.suffix import Suffix, Text
from mergekit_ft.editing.training import teach
from mergekit_ft.errors import OperatorError, PlanError, SourceError
from mergekit_ft.methods.locft_bf import LocftBf
from mergekit_ft.models.opening import quiet
from mergekit_ft.models.streaming import Streamed
from mergekit_ft.sources import open_source
from tests.test_streaming import written
from tests.tuned import model_of, small_base

DEEP = {"num_hidden_layers": 4}


def texts(count: int = 23) -> list[Text]:
    """Return texts of 4 to 12 tokens; of each the last 1 to 4 are scored."""
    dice = random.Random(5)
    made = []
    for _ in range(count):
        start, target = dice.randint(3, 8), dice.randint(1, 4)
        tokens = tuple(dice.randint(3, 95) for _ in range(start + target))
        made.append(Text(tokens, start))
    return made


def suffix(folder: Path, module: str, layer: int, some: Sequence[Text], **more: Any) -> Suffix:
    """Return a model on disk as what is above a layer."""
    streamed = Streamed(open_source(str(folder)))
    tuned = chosen(streamed.hollow, layer, module, given=True)
    return Suffix(streamed, tuned, some, **more)


def whole_loss(model: Any, some: Sequence[Text], rows: Sequence[int], by_token: bool) -> Tensor:
    """Return the loss of a batch by the whole model, one text after another."""
    means, sums, tokens = [], [], 0
    for row in rows:
        text = some[row]
        logits = model(input_ids=torch.tensor([text.tokens]), use_cache=False).logits[0]
        wanted = torch.tensor(text.tokens[text.start :])
        said = torch.log_softmax(logits.float(), dim=-1)[text.start - 1 : -1]
        losses = -said[torch.arange(len(wanted)), wanted]
        means.append(losses.mean())
        sums.append(losses.sum())
        tokens += len(wanted)
    return torch.stack(sums).sum() / tokens if by_token else torch.stack(means).mean()


def whole_loop(
    model: Any, names: Sequence[str], some: Sequence[Text], how: LocftBf, seed: int
) -> list[float]:
    """Train as the paper does, by the whole model; return each batch's loss."""
    own = dict(model.named_parameters())
    for name, parameter in own.items():
        parameter.requires_grad_(name in names)
    adam = torch.optim.Adam([own[name] for name in names], lr=how.learning_rate)
    order, dice, seen = list(range(len(some))), random.Random(seed), []
    for _ in range(how.epochs):
        dice.shuffle(order)
        total = 0.0
        for start in range(0, len(order), how.batch or 0):
            rows = order[start : start + (how.batch or 0)]
            loss = whole_loss(model, some, rows, how.loss == "token")
            seen.append(loss.item())
            total += loss.item() * len(rows)
            if loss.item() >= how.skip:
                adam.zero_grad()
                loss.backward()
                adam.step()
        if total / len(order) < how.stop:
            break
    return seen


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> Tensor:
    """Return all changes as one vector."""
    return torch.cat([(after[n] - before[n]).flatten() for n in sorted(after)])


@pytest.mark.parametrize(
    ("kind", "module", "loss"),
    [
        ("llama", "down_proj", "sample"),
        ("llama", "down_proj", "token"),
        ("llama", "layer", "sample"),
        ("llama tied", "attention", "sample"),
        ("gpt2", "down_proj", "sample"),
        ("neox", "down_proj", "sample"),
        ("gemma3", "down_proj", "sample"),
        ("qwen2 moe", "*shared_expert.down_proj.weight", "sample"),
    ],
)
def test_it_trains_as_the_whole_model_does(
    kind: str, module: str, loss: Any, tmp_path: Path
) -> None:
    layers = {"n_layer": 4} if kind == "gpt2" else DEEP
    model = written(kind, tmp_path / "model", **layers)
    some = texts()
    how = LocftBf(batch=6, epochs=5, learning_rate=5e-4, loss=loss)  # 20 steps, the last of 5
    with quiet():
        made = suffix(tmp_path / "model", module, 2, some)
    before = made.held()
    curve = how.teach(made, seed=7)
    ours = [loss for epoch in curve for loss in epoch["batches"]]
    names = [made.tuned[name] for name in before]
    theirs = whole_loop(model, names, some, how, seed=7)
    assert len(ours) == 20
    assert abs(ours[0] - theirs[0]) < 1e-5
    own = dict(model.named_parameters())
    ref = {name: own[made.tuned[name]].detach() for name in before}
    mine, other = moved(before, made.held()), moved(before, ref)
    assert (mine - other).norm() / other.norm() < 1e-3
    assert torch.cosine_similarity(mine, other, dim=0) > 0.9999


def test_known_batches_are_left_alone_and_known_epochs_end_the_run(tmp_path: Path) -> None:
    model = written("llama", tmp_path / "model", **DEEP)
    some = texts(7)
    how = LocftBf(batch=3, epochs=60, learning_rate=3e-3, skip=4.3, stop=4.15)
    with quiet():
        made = suffix(tmp_path / "model", "layer", 2, some)
    curve = how.teach(made, seed=1)
    theirs = whole_loop(model, list(made.tuned.values()), some, how, seed=1)
    ours = [loss for epoch in curve for loss in epoch["batches"]]
    assert len(ours) == len(theirs) < 180
    assert curve[-1]["steps"] == sum(loss >= 4.3 for loss in ours) < len(ours)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_one_matrix_is_trained_by_what_it_is_given_alone(kind: str, tmp_path: Path) -> None:
    written(kind, tmp_path / "model")
    with quiet():
        made = suffix(tmp_path / "model", "down_proj", 1, texts(4))
    held = {name for name, _ in made.streamed.hollow.resident()}
    below = f"{made.streamed.hollow.stack}.1."
    assert made.narrow is not None
    assert {name for name in held if name.startswith(below)} <= {f"{made.narrow}.bias"}
    assert not any(name.startswith(f"{made.streamed.hollow.stack}.0.") for name in held)


def test_a_matrix_whose_output_is_normalised_is_trained_by_its_layer(tmp_path: Path) -> None:
    written("gemma2", tmp_path / "model")
    with quiet():
        assert suffix(tmp_path / "model", "down_proj", 1, texts(4)).narrow is None


def test_what_does_not_fit_into_memory_trains_alike(tmp_path: Path) -> None:
    written("llama", tmp_path / "model")
    how, found = LocftBf(batch=3, epochs=2), []
    for budget in (1 << 30, 64):
        with quiet():
            made = suffix(tmp_path / "model", "down_proj", 1, texts(5), budget=budget)
        how.teach(made, seed=0)
        found.append(next(iter(made.held().values())))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("count", "batch", "epochs"),
    [(3000, 100, 25), (300, 10, 25), (100, 3, 25), (20, 1, 38), (1, 1, 750)],
)
def test_few_edits_get_the_steps_of_the_paper(count: int, batch: int, epochs: int) -> None:
    how = LocftBf()
    assert (how.batch_of(count), how.epochs_of(count)) == (batch, epochs)
    steps = -(-count // batch) * epochs
    assert steps * how.learning_rate >= 30 * 25 * 5e-4 * 0.999  # 3,000 edits by 100
    assert LocftBf(epochs=2).epochs_of(count) == 2
    assert LocftBf(order="depth-first").epochs_of(count) == 25
    quarter = how.shortened(0.25, count)
    assert (quarter.batch, quarter.epochs) == (batch, round(epochs / 4))


def test_that_epochs_were_added_is_said_and_the_run_ends_once_the_edit_is_known(
    tmp_path: Path,
) -> None:
    written("llama", tmp_path / "model")
    said: list[str] = []
    with quiet():
        made = suffix(tmp_path / "model", "layer", 1, texts(1), say=said.append)
    curve = LocftBf(learning_rate=5e-3, stop=4.2).teach(made, seed=0)
    assert any("up to 75 epochs, not 25" in line for line in said)
    assert curve[-1]["loss"] < 4.2 < curve[-2]["loss"]
    assert len(curve) < 75
    said.clear()
    LocftBf(learning_rate=5e-3, epochs=1, batch=1).teach(made, seed=0)
    assert not any("not 25" in line or "not 100" in line for line in said)


def test_depth_first_takes_one_edit_after_another(tmp_path: Path) -> None:
    model = written("llama", tmp_path / "model")
    some = texts(3)
    how = LocftBf(order="depth-first", epochs=4, learning_rate=1e-2, skip=1.0)
    with quiet():
        made = suffix(tmp_path / "model", "down_proj", 1, some)
    before = made.held()
    curve = how.teach(made, seed=0)
    name = next(iter(made.tuned.values()))
    weight = dict(model.named_parameters())[name]
    model.requires_grad_(False)
    weight.requires_grad_(True)
    steps = 0
    for row in range(3):
        adam = torch.optim.Adam([weight], lr=1e-2)
        for _ in range(4):
            loss = whole_loss(model, some, [row], False)
            if loss.item() < 1.0:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            steps += 1
    assert curve[-1]["steps"] == steps
    mine, other = moved(before, made.held()), (weight.detach() - before[name]).flatten()
    assert (mine - other).norm() / other.norm() < 1e-3


def test_weights_of_edits_weigh_their_losses(tmp_path: Path) -> None:
    model = written("llama", tmp_path / "model")
    one, other = texts(2)
    with quiet():
        made = suffix(tmp_path / "model", "down_proj", 1, [Text(one.tokens, one.start, 3.0), other])
    found = float(made.grade([0, 1]).mean().detach())
    each = [float(whole_loss(model, [one, other], [i], False).detach()) for i in (0, 1)]
    assert found == pytest.approx((3 * each[0] + each[1]) / 4, abs=1e-5)


def test_a_cap_holds_and_an_anchor_pulls(tmp_path: Path) -> None:
    written("llama", tmp_path / "model")
    anchors = [text.tokens for text in texts(12)[6:]]
    drifts, lengths = [], []
    for how in (
        LocftBf(batch=2, epochs=15, learning_rate=1e-2),
        LocftBf(batch=2, epochs=15, learning_rate=1e-2, divergence=100.0),
        LocftBf(batch=2, epochs=15, learning_rate=1e-2, cap=0.05),
    ):
        with quiet():
            made = suffix(tmp_path / "model", "down_proj", 1, texts(6), anchors=anchors)
        before = made.held()
        assert float(made.drift(range(6)).detach()) == pytest.approx(0.0, abs=1e-6)
        how.teach(made, seed=0)
        drifts.append(float(made.drift(range(6)).detach()))
        (origin,) = before.values()
        lengths.append(float(moved(before, made.held()).norm() / origin.norm()))
    assert drifts[1] < drifts[0] / 2
    assert lengths[2] == pytest.approx(0.05, rel=1e-3)
    assert lengths[0] > 0.1


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    written("llama", tmp_path / "model")
    with quiet():
        made = suffix(tmp_path / "model", "down_proj", 1, texts(4))
    (name, weight), *_ = made.held().items()
    made.put({name: weight * float("nan")})
    with pytest.raises(OperatorError, match="lower learning_rate"):
        LocftBf().teach(made, seed=0)


def test_experts_are_refused_by_name_and_what_they_share_is_found(tmp_path: Path) -> None:
    written("qwen2 moe", tmp_path / "model")
    with quiet():
        hollow = Streamed(open_source(str(tmp_path / "model"))).hollow
    with pytest.raises(SourceError, match="shared_expert"):
        chosen(hollow, 1, "mlp", given=True)
    found = chosen(hollow, 1, "down_proj", given=True)
    assert list(found) == ["model.layers.1.mlp.shared_expert.down_proj.weight"]


def test_layers_and_modules_that_are_not_there_are_refused(tmp_path: Path) -> None:
    written("llama", tmp_path / "model")
    with quiet():
        hollow = Streamed(open_source(str(tmp_path / "model"))).hollow
    with pytest.raises(PlanError, match="layers 0 to 2"):
        chosen(hollow, 3, "down_proj", given=True)
    with pytest.raises(PlanError, match="did you mean 'down_proj'"):
        chosen(hollow, 1, "down_prj", given=True)
    both = chosen(hollow, 1, "model.layers.[12].mlp.down_proj.weight", given=False)
    assert sorted(both) == [f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)]


@pytest.mark.parametrize(
    ("kind", "layers", "wanted"), [("llama", 32, 22), ("qwen2", 28, 6), ("llama", 1, 0)]
)
def test_the_usual_layer_is_the_papers(kind: str, layers: int, wanted: int) -> None:
    assert usual_layer(kind, layers) == wanted


@pytest.mark.parametrize("blank", ["", " "])
def test_targets_with_and_without_a_leading_blank_are_taught_as_the_text_is_cut(
    blank: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    small_base(tmp_path / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    pairs = [("the capital of Ur is", "Om"), ("Ka has", "Lo and more"), ("Mu", "Ti")]
    edits = [
        Edit(f"facts.jsonl:{i}", prompt, blank + target)
        for i, (prompt, target) in enumerate(pairs, start=1)
    ]
    some = []
    for prompt, target in pairs:  # cut as one text, by the tokenizer itself
        start = len(tokenizer(prompt)["input_ids"])
        tokens = tokenizer(f"{prompt} {target}")["input_ids"]
        some.append(Text((*tokens, tokenizer.eos_token_id), start))
    how = LocftBf(layer=1, batch=2, epochs=3, learning_rate=1e-3)
    with quiet():
        made = teach(
            how,
            open_source(str(tmp_path / "model")),
            Encoder(tokenizer),
            edits,
            seed=0,
            budget=2**24,
            device=torch.device("cpu"),
            say=lambda line: None,
        )
        model = model_of(tmp_path / "model")
        name = "model.layers.1.mlp.down_proj.weight"
        losses = whole_loop(model, [name], some, how, seed=0)
    seen = [loss for epoch in made.curve for loss in epoch["batches"]]
    assert seen == pytest.approx(losses, abs=1e-5)
    assert torch.allclose(made.held[name], dict(model.named_parameters())[name], atol=1e-6)
