"""Fitted weights put into one checkpoint: verified before it is written, refined where far off."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mergekit_ft.errors import MergekitError, PlanError, SourceError, WriteError
from mergekit_ft.fusion import Baked, bake, baking, fit, merge, verifying
from mergekit_ft.fusion.baking import FILE, merge_words
from mergekit_ft.fusion.refining import Coefficients, Refiner
from mergekit_ft.fusion.weights import Weights, read_weights
from mergekit_ft.inspection.verify import verify
from mergekit_ft.models.opening import open_base
from mergekit_ft.plan.fusing import read_fuse
from mergekit_ft.resolution.opening import open_reference
from tests.fused import TASKS, expert, family, model_of
from tests.small_models import cli, hashes

Words = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a family of models and weights fitted for them, logits kept."""
    fit(family(tmp_path, tied=True), tmp_path / "w.json", cache=tmp_path / "cache")
    return tmp_path


def baked(folder: Path, out: str = "out", **options: Any) -> Baked:
    return bake(folder / "w.json", folder / out, cache=folder / "cache", **options)


def test_a_bake_is_the_base_and_weighted_task_vectors(folder: Path) -> None:
    made = baked(folder)
    base, *tuned = (load_file(folder / n / "model.safetensors") for n in ("base", *TASKS))
    out = load_file(folder / "out" / "model.safetensors")
    assert out.keys() == base.keys() and "lm_head.weight" not in out
    for name, values in out.items():
        wanted = base[name].double()
        for alpha, model in zip(made.alpha.values(), tuned, strict=True):
            wanted += alpha * (model[name].double() - base[name].double())
        assert torch.allclose(values.double(), wanted, atol=1e-6), name
    assert made.first is None


def test_what_is_measured_is_what_the_written_model_says(folder: Path) -> None:
    made = baked(folder)
    words, _ = read_fuse(family_plan(folder))
    from transformers import AutoTokenizer

    from mergekit_ft.fusion.texts import read_texts

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    texts = read_texts(words.calibration, tokenizer)
    models = [model_of(folder / name) for name in ("base", *TASKS, "out")]
    for part in (part for part in texts.parts if part.held):
        rows = []
        for sample in part.samples:
            tokens = torch.tensor([sample.tokens])
            with torch.no_grad():
                logits = [model(tokens).logits[0].double() for model in models]
            base, *tuned, merged = logits
            moved = zip(made.alpha.values(), tuned, strict=True)
            fused = base + sum(a * (t - base) for a, t in moved)
            f, m, b = (torch.log_softmax(x, -1) for x in (fused, merged, base))
            for at, label in enumerate(sample.labels[1:]):
                if label != -100:
                    rows.append([-float(x[at, label]) for x in (b, f, m)] + [
                        float((f[at].exp() * (f[at] - m[at])).sum()),
                        float((f[at].exp() * (f[at] - b[at])).sum()),
                        float(f[at].argmax() == m[at].argmax())])  # fmt: skip
        wanted = torch.tensor(rows).mean(0).tolist()
        assert list(made.measured[part.domain].values()) == pytest.approx(wanted, abs=2e-3)


def family_plan(folder: Path) -> str:
    plan: str = read_weights(folder / "w.json").story["plan"]
    return plan


def test_the_lock_holds_the_weights_and_verify_checks_the_merge(folder: Path) -> None:
    made = baked(folder)
    lock = json.loads((folder / "out" / "mergekit_ft.lock.json").read_text())
    assert lock["method"] == "logit_fusion"
    assert lock["fusion"]["alpha"] == dict(made.alpha)
    assert lock["fusion"]["baked"]["held_out"]["by_domain"] == made.measured
    assert json.loads((folder / "out" / FILE).read_text()) == lock["fusion"]
    assert "## Against the fused models" in (folder / "out" / "README.md").read_text()
    report = verify(folder / "out", sample=None)
    assert report["ok"] and report["tensors"]["recomputed"] == report["tensors"]["of"]


def test_one_domains_weights_are_baked_where_asked_for(folder: Path) -> None:
    weights = read_weights(folder / "w.json")
    domain = max(weights.alpha_by_domain, key=lambda d: sum(weights.alpha_by_domain[d].values()))
    assert baked(folder, domain=domain).alpha == weights.alpha_by_domain[domain] != weights.alpha
    with pytest.raises(SourceError, match="no weights were fitted for domain 'x'"):
        baked(folder, "other", domain="x")


def test_the_same_bake_has_the_same_bytes(folder: Path) -> None:
    baked(folder)
    bake(folder / "w.json", folder / "again")
    assert hashes(folder / "out") == hashes(folder / "again")
    assert not (folder / "again.work").exists()


# --- refining -------------------------------------------------------------------------------------


def far(folder: Path) -> Weights:
    """Fit the weights of experts so far off that the merge is not near."""
    for seed, name in enumerate(TASKS):
        shutil.rmtree(folder / name)
        expert(folder / "base", folder / name, seed, scale=0.25)
    words = yaml.safe_load(family_plan(folder))
    words["fusion"] = {"dynamic_logit_fusion": {"centre": 0.8, "ridge": 10.0}}
    return fit(words, folder / "w.json", cache=folder / "cache", overwrite=True).weights


def refiner(folder: Path, weights: Weights, dtype: torch.dtype = torch.float32) -> Refiner:
    base = open_base(weights.base)
    made = fit(family_words(weights), folder / "x.json", cache=folder / "cache", overwrite=True)
    sources = {name: open_reference(model) for name, model in weights.experts.items()}
    stored = dict.fromkeys(base.parameters, dtype)
    return Refiner(base, sources, made.collection, list(weights.alpha.values()), stored)


def family_words(weights: Weights) -> str:
    return str(weights.story["plan"])


def test_one_backward_pass_gives_every_coefficients_derivative(folder: Path) -> None:
    weights = far(folder)
    one = refiner(folder, weights)
    dice = torch.Generator().manual_seed(3)
    noise = torch.randn(one.origin.values.shape, generator=dice, dtype=torch.float64)
    at = Coefficients(one.origin.tensors, one.origin.values + 0.1 * noise)
    _, gradient = one.loss(at)
    assert all(parameter.grad is None for parameter in one.base.model.parameters())
    step = 3e-3
    for t in range(2):
        for column, _ in enumerate(at.tensors):
            ends = []
            for sign in (1, -1):
                values = at.values.clone()
                values[t, column] += sign * step
                ends.append(one.loss(Coefficients(at.tensors, values), graded=False)[0])
            slope = (ends[0] - ends[1]) / (2 * step)
            assert float(gradient[t, column]) == pytest.approx(slope, rel=0.02, abs=2e-4)


def test_the_model_that_is_refined_is_rounded_as_it_will_be_stored(folder: Path) -> None:
    one = refiner(folder, far(folder), torch.bfloat16)
    one.put(one.origin)
    for name, parameter in one.base.parameters.items():
        wanted = one.base.origin(name).double()
        for alpha, source in zip(one.alpha.tolist(), one.experts.values(), strict=True):
            wanted += alpha * (source.tensor(name).double() - one.base.origin(name).double())
        assert torch.equal(parameter, parameter.bfloat16().float())
        assert torch.allclose(parameter.double(), wanted, rtol=2**-8, atol=1e-7), name


def test_a_merge_that_is_far_off_is_refined_tensor_by_tensor(folder: Path) -> None:
    far(folder)
    plain = baked(folder, "plain", refine=False)
    assert verifying.excess(plain.measured) > 1
    assert any("does not say what the fused models say" in note for note in plain.notes)
    made = baked(folder)
    assert made.first == plain.measured
    assert verifying.excess(made.measured) < verifying.excess(plain.measured)
    lock = json.loads((folder / "out" / "mergekit_ft.lock.json").read_text())
    assert "up_proj" in lock["plan"] and "before_refining" in lock["fusion"]["baked"]
    assert verify(folder / "out", sample=None)["ok"]


def test_a_head_that_is_stored_beside_the_embeddings_it_is_tied_to_is_refined_as_they_are(
    folder: Path,
) -> None:
    far(folder)
    for name in ("base", *TASKS):
        path = folder / name / "model.safetensors"
        tensors = load_file(path)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, path, {"format": "pt"})
    made = baked(folder)
    assert made.first is not None
    out = load_file(folder / "out" / "model.safetensors")
    assert torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("merged", "wanted"),
    [
        ((0.3, 0.40), 1.5),  # 0.3 of 0.2, a tenth of 2.0; 0.04 of 0.05 in the other domain is near
        ((0.1, 0.48), 2.0),  # 0.08 nats lost, of 0.04
        ((0.1, 0.20), 0.8),  # nats won; left is 0.04 of 0.05 in the other domain
    ],
)
def test_nearness_is_the_worst_domains(merged: tuple[float, float], wanted: float) -> None:
    near = {"kl merged": 0.04, "kl base": 0.1, "nats fused": 0.05, "nats merged": 0.055}
    other = {"kl merged": merged[0], "kl base": 2.0, "nats fused": 0.4, "nats merged": merged[1]}
    assert verifying.excess({"a": near, "b": other}) == pytest.approx(wanted)


# --- refusals -------------------------------------------------------------------------------------


def test_experts_of_another_shape_are_refused_before_anything_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "words" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-8].contiguous()
    save_file(tensors, path, {"format": "pt"})
    monkeypatch.setattr(baking, "collect", None)
    with pytest.raises(MergekitError, match=r"not like those of .*up_proj"):
        baked(folder)
    assert read_weights(folder / "w.json").alpha and not (folder / "out").exists()


def test_an_expert_that_is_gone_is_named_as_that(folder: Path) -> None:
    shutil.rmtree(folder / "words")
    with pytest.raises(MergekitError, match=r"words: no such folder") as told:
        baked(folder)
    assert "not like" not in str(told.value) and not (folder / "out").exists()


def test_experts_of_another_small_base_are_refused(folder: Path) -> None:
    path = folder / "w.json"
    words = json.loads(path.read_text())
    words["small"] = {"path": str(folder / "sums")}
    path.write_text(json.dumps(words))
    with pytest.raises(PlanError, match="of another model's weights"):
        baked(folder)


def test_without_held_out_places_nothing_is_baked(folder: Path) -> None:
    plan = yaml.safe_load(family_plan(folder))
    plan["calibration"]["held_out"] = 0
    fit(plan, folder / "w.json", overwrite=True)
    with pytest.raises(PlanError, match="nothing was held out"):
        baked(folder)
    assert not (folder / "out").exists()


def test_an_output_that_is_there_is_kept(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "mine").write_text("x")
    with pytest.raises(WriteError, match="exists"):
        baked(folder)
    assert (folder / "out" / "mine").exists()


def test_a_bake_that_dies_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*given: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(baking, "measured", die)
    with pytest.raises(KeyboardInterrupt):
        baked(folder)
    assert not (folder / "out").exists() and not (folder / "out.part").exists()


def test_the_command_tells_the_figures(folder: Path) -> None:
    words = ("fuse", "bake", str(folder / "w.json"), str(folder / "out"))
    result = cli(*words, "--cache", str(folder / "cache"))
    assert result.exit_code == 0, result.output
    assert "sums, held out: nats base" in result.output and "changed" in result.output
    again = cli(*words, "--cache", str(folder / "cache"), "--overwrite", "--json", "--quiet")
    assert set(json.loads(again.stdout)["held_out"]) == {*TASKS, "neutral"}


def test_weights_of_tensors_are_a_plans_words(folder: Path) -> None:
    weights = read_weights(folder / "w.json")
    values = torch.tensor([[0.5, 0.25], [0.1, 0.2]], dtype=torch.float64)
    names = ("model.norm.weight", "odd[0].weight")
    words = merge_words(weights, weights.alpha, Coefficients(names, values))
    assert words["models"][0]["parameters"]["weight"] == [
        {"match": "model.norm.weight", "value": 0.5},
        {"match": "odd[[]0].weight", "value": 0.25},
    ]


# --- a merge plan that calibrates -----------------------------------------------------------------


def calibrating(folder: Path, **more: Any) -> Words:
    words = yaml.safe_load(family_plan(folder))
    return {
        "merge_method": "logit_fusion",
        "base_model": words["base"],
        "models": [{"model": model} for model in words["experts"].values()],
        "calibration": words["calibration"],
        **more,
    }


def run(command: str, plan: Words, folder: Path, *words: str) -> Any:
    (folder / "merge.yaml").write_text(yaml.safe_dump(plan))
    out = [str(folder / "merged")] if command == "merge" else []
    return cli(command, str(folder / "merge.yaml"), *out, *words)


def test_a_plan_that_calibrates_is_fit_and_bake_in_one(folder: Path) -> None:
    result = run("merge", calibrating(folder), folder)
    assert result.exit_code == 0, result.output
    made = baked(folder)
    lock = json.loads((folder / "merged" / "mergekit_ft.lock.json").read_text())
    assert list(lock["fusion"]["alpha"].values()) == list(made.alpha.values())
    assert "calibration" not in lock["plan"] and lock["method"] == "logit_fusion"
    for name in ("model.safetensors", "config.json"):
        assert (folder / "merged" / name).read_bytes() == (folder / "out" / name).read_bytes()
    assert not (folder / "merged.work").exists()


def test_verify_needs_no_second_calibration(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("merge", calibrating(folder), folder).exit_code == 0
    for name in TASKS:
        (folder / f"{name}.jsonl").unlink()
    assert verify(folder / "merged", sample=None)["ok"]
    again = cli("merge", str(folder / "merged" / "mergekit_config.yml"), str(folder / "again"))
    assert again.exit_code == 0, again.output
    name = "model.safetensors"
    assert (folder / "again" / name).read_bytes() == (folder / "merged" / name).read_bytes()


def test_other_words_of_the_merge_stay(folder: Path) -> None:
    plan = calibrating(folder, dtype="bfloat16")
    plan["calibration"] |= {"fusion": {"dynamic_logit_fusion": {"ridge": 0.5}}}
    assert run("merge", plan, folder).exit_code == 0
    out = load_file(folder / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in out.values()} == {torch.bfloat16}
    lock = json.loads((folder / "merged" / "mergekit_ft.lock.json").read_text())
    assert "ridge: 0.5" in lock["fusion"]["plan"]


def test_all_faults_of_a_plan_that_calibrates_are_told_at_once(folder: Path) -> None:
    plan = calibrating(folder, dtyp="bfloat16", tokenizer={"source": "union"})
    plan["models"][0]["parameters"] = {"weight": 0.5}
    plan["calibration"] |= {"heldout": 0.5, "fusion": {"dynamic_logit_fusion": {"rigde": 1}}}
    result = run("merge", plan, folder)
    assert result.exit_code == 3
    for said in (
        "unknown key 'dtyp'; did you mean 'dtype'",
        "tokenizer cannot stand beside calibration",
        "a model has no parameters beside it",
        "unknown key 'heldout'; did you mean 'held_",
        "unknown key 'rigde'; did you mean 'ridge'",
    ):
        assert said in result.stderr, result.stderr
    plan = calibrating(folder, merge_method="ties")
    assert "of `merge_method: logit_fusion` alone" in run("merge", plan, folder).stderr
    assert not (folder / "merged").exists()


def test_check_tells_what_a_calibration_will_take(folder: Path) -> None:
    result = run("check", calibrating(folder), folder)
    assert result.exit_code == 0, result.output
    assert "calibration: 3 models are asked about" in result.output
    told = json.loads(run("check", calibrating(folder), folder, "--json").stdout)["calibration"]
    vocabulary = read_weights(folder / "w.json").story["vocabulary"]
    assert told["bytes"] == 3 * told["places"] * (2 * vocabulary + 4)


def test_what_knows_no_texts_refuses_a_calibration_by_name(folder: Path) -> None:
    import mergekit_ft

    plan = calibrating(folder)
    for carried_out in (lambda: mergekit_ft.merge(plan, folder / "x"),
                        lambda: mergekit_ft.open_plan(plan)):  # fmt: skip
        with pytest.raises(PlanError, match="calibration is fitted before a merge"):
            carried_out()
    made = merge(plan, folder / "y", cache=folder / "cache")
    assert made.changed
