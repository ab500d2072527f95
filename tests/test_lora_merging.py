"""Merged adapters are the sum of their deltas, its nearest, or what an operator makes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_ft.cli import main
from mergekit_ft.lora import core
from mergekit_ft.lora.members import members
from mergekit_ft.registry import method
from mergekit_ft.sources import adapted, open_adapter, open_source
from tests.checkpoints import tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft, on what it saves and loads
PREFIX = "base_model.model."
MIXED: list[dict[str, Any]] = [  # ranks, scales, patterns and targets that all differ
    {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 5},
        "alpha_pattern": {"v_proj": 2},
    },
    {
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"gate_proj": 1},
    },
]
WEIGHTS = [0.5, -0.75, 1.25]


def trained(base: Path, folder: Path, seed: int, **words: Any) -> dict[str, Tensor]:
    """Save an adapter of random factors; return the float64 delta of each weight, by peft."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**words))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {name: tensor.double().clone() for name, tensor in plain.state_dict().items()}
    wide = PeftModel.from_pretrained(plain, folder).double().merge_and_unload()
    after = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    return {name: after[name] - before[name] for name in before}


def run(*words: Any, fails: int = 0) -> Any:
    result = CliRunner().invoke(main, ["lora", "merge", *map(str, words)])
    assert result.exit_code == fails, result.output + result.stderr
    if fails:
        assert not result.stdout and "Traceback" not in result.stderr
        return result.stderr
    return json.loads(result.stdout)


def merge(*words: Any) -> Any:
    return run(*words, "--json", "--quiet")


def weighted(weights: Sequence[float]) -> list[Any]:
    return [word for weight in weights for word in ("--weight", weight)]


def model_of(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.double().eval()(input_ids=torch.arange(1, 14)[None]).logits
    return out


def summed(base: Path, deltas: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> Any:
    """Return the model whose weights are the base's and the weighted sum, in float64."""
    model = model_of(base).double()
    state = model.state_dict()
    for delta, weight in zip(deltas, weights, strict=True):
        state = {name: tensor + weight * delta[name] for name, tensor in state.items()}
    model.load_state_dict(state)
    return model


def with_adapter(base: Path, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model_of(base), folder)


def deltas_of(folder: Path) -> dict[str, Tensor]:
    """Return scale * B @ A of each module in float64, from the files alone."""
    files = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for name, a in files.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            b = files[name.replace("lora_A", "lora_B")]
            rank = config["rank_pattern"].get(module, config["r"])
            assert (b.shape[1], a.shape[0]) == (rank, rank)
            assert config["alpha_pattern"].get(module, config["lora_alpha"]) == rank  # scale 1
            found[module] = b.double() @ a.double()
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a base, three mixed adapters on it, and peft's delta of each."""
    home = tmp_path_factory.mktemp("adapters")
    base = tiny_llama(home / "base")
    folders = [home / name for name in "abc"]
    deltas = [trained(base, f, i, **w) for i, (f, w) in enumerate(zip(folders, MIXED, strict=True))]
    return base, folders, deltas


def test_concat_of_mixed_adapters_is_exact_in_logits(made: Any, tmp_path: Path) -> None:
    base, folders, deltas = made
    report = merge(*folders, tmp_path / "out", *weighted(WEIGHTS))
    mine = logits(with_adapter(base, tmp_path / "out"))
    wanted = logits(summed(base, deltas, WEIGHTS))
    assert float((mine - wanted).abs().max()) < 1e-6
    assert float((wanted - logits(model_of(base))).abs().max()) > 0.05  # there was something to add
    ranks = {matrix["module"]: matrix["rank"] for matrix in report["matrices"]}
    assert ranks["model.layers.0.self_attn.q_proj"] == 4 + 3 + 2
    assert ranks["model.layers.1.self_attn.q_proj"] == 4 + 5 + 2
    assert ranks["model.layers.1.mlp.gate_proj"] == 1
    assert len(ranks) == 14


def test_pefts_linear_combination_is_not_the_sum(made: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    base, folders, _ = made
    model = PeftModel.from_pretrained(model_of(base), folders[0], adapter_name="a")
    model.load_adapter(folders[1], adapter_name="b")
    with pytest.raises(ValueError, match="same r"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both", combination_type="linear")
    words = MIXED[0]
    homes = [tmp_path / name for name in "de"]
    deltas = [trained(base, home, i + 5, **words) for i, home in enumerate(homes)]
    wanted = logits(summed(base, deltas, [0.5, 0.5]))
    model = PeftModel.from_pretrained(model_of(base), homes[0], adapter_name="d")
    model.load_adapter(homes[1], adapter_name="e")
    model.add_weighted_adapter(["d", "e"], [0.5, 0.5], "both", combination_type="linear")
    model.set_adapter("both")
    theirs = float((logits(model) - wanted).abs().max())
    merge(*homes, tmp_path / "out", "--weight", 0.5)
    ours = float((logits(with_adapter(base, tmp_path / "out")) - wanted).abs().max())
    assert ours < 1e-6 < 1e-2 < theirs


def test_one_adapter_of_weight_one_stays_what_it_is(made: Any, tmp_path: Path) -> None:
    base, folders, deltas = made
    merge(folders[0], tmp_path / "out")
    mine = logits(with_adapter(base, tmp_path / "out"))
    assert float((mine - logits(summed(base, deltas[:1], [1.0]))).abs().max()) < 1e-6


@pytest.mark.parametrize("rank", [1, 4, 100])
def test_svd_is_the_nearest_of_its_rank_and_prints_the_energy(
    made: Any, tmp_path: Path, rank: int
) -> None:
    _, folders, deltas = made
    words = weighted(WEIGHTS)
    report = merge(*folders, tmp_path / "out", "--method", "svd", "--rank", rank, *words)
    mine = deltas_of(tmp_path / "out")
    missed = total = 0.0
    for matrix in report["matrices"]:
        name = f"{matrix['module']}.weight"
        whole = sum(w * d[name] for w, d in zip(WEIGHTS, deltas, strict=True)).numpy()
        u, s, v = np.linalg.svd(whole, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert np.abs(mine[matrix["module"]].numpy() - best).max() < 1e-6
        assert matrix["rank"] == min(rank, int((s > 1e-6 * s[0]).sum()))
        share = (s[:rank] ** 2).sum() / (s**2).sum()
        assert matrix["energy"] == pytest.approx(share, abs=1e-6)
        missed, total = missed + (s[rank:] ** 2).sum(), total + (s**2).sum()
    assert report["totals"]["energy"] == pytest.approx(1 - missed / total, abs=1e-6)


def test_svd_to_an_energy_takes_the_least_rank(made: Any, tmp_path: Path) -> None:
    _, folders, deltas = made
    report = merge(*folders, tmp_path / "out", "--method", "svd", "--energy", 0.8)
    for matrix in report["matrices"]:
        whole = sum(delta[f"{matrix['module']}.weight"] for delta in deltas)
        squares = np.linalg.svd(whole.numpy())[1] ** 2
        least = int(np.argmax(np.cumsum(squares) >= 0.8 * squares.sum())) + 1
        assert matrix["rank"] == least and matrix["energy"] >= 0.8


@pytest.mark.parametrize("space", ["core", "knots"])
def test_the_small_matrices_hold_each_adapter_whole(made: Any, space: Any) -> None:
    _, folders, deltas = made
    held = members([open_adapter(str(folder)) for folder in folders], [])
    for module, shape in held.shapes.items():
        basis = core.bases(held, module, space)
        eye = torch.eye(basis[0].shape[1], dtype=torch.float64)
        assert float((basis[0].T @ basis[0] - eye).abs().max()) < 1e-12
        assert basis[0].shape[1] <= held.ranks(module)
        for member, delta in zip(held, deltas, strict=True):
            small = core.core(basis, shape, member.factors(module))
            left, right = core.product(basis, small)
            assert float((left @ right - delta[f"{module}.weight"]).abs().max()) < 1e-7


@pytest.mark.parametrize("space", ["core", "knots"])
def test_a_weighted_sum_in_a_space_is_concat(made: Any, tmp_path: Path, space: str) -> None:
    _, folders, deltas = made
    words = ("--method", space, "--operator", "task_arithmetic", *weighted(WEIGHTS))
    report = merge(*folders, tmp_path / "out", *words)
    mine = deltas_of(tmp_path / "out")
    for module, delta in mine.items():
        pairs = zip(WEIGHTS, deltas, strict=True)
        whole = sum(weight * found[f"{module}.weight"] for weight, found in pairs)
        assert float((delta - whole).abs().max()) < 1e-6
    assert all(matrix["svd"] == space for matrix in report["matrices"])


def ties(cores: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Return Yadav et al.'s Algorithm 1 on small matrices, written out."""
    trimmed = []
    for matrix in cores:
        count = round(density * matrix.numel())
        least = matrix.abs().flatten().sort(descending=True).values[count - 1]
        trimmed.append(torch.where(matrix.abs() >= least, matrix, 0.0))
    sign = torch.sign(sum(w * m for w, m in zip(weights, trimmed, strict=True)))
    above = below = torch.zeros_like(cores[0])
    for w, m in zip(weights, trimmed, strict=True):
        agrees = (torch.sign(w * m) == sign) & (m != 0)
        above, below = above + agrees * w * m, below + agrees * w
    return torch.where(below != 0, above / below, 0.0)


def test_ties_in_core_space_is_the_papers_arithmetic_on_the_cores(
    made: Any, tmp_path: Path
) -> None:
    _, folders, deltas = made
    words = ("--method", "core", "--operator", "ties", "--set", "density=0.5")
    merge(*folders[:2], tmp_path / "out", *words, *weighted([0.7, 0.3]))
    mine, module = deltas_of(tmp_path / "out"), "model.layers.0.self_attn.q_proj"
    files = [load_file(folder / "adapter_model.safetensors") for folder in folders[:2]]
    b, a = ([f[f"{PREFIX}{module}.lora_{side}.weight"].double() for f in files] for side in "BA")
    scales = [16 / 4**0.5, 6 / 3]
    scaled = np.concatenate([s * m.numpy() for s, m in zip(scales, b, strict=True)], axis=1)
    u = torch.from_numpy(np.linalg.svd(scaled, full_matrices=False)[0])
    v = torch.from_numpy(np.linalg.svd(np.concatenate([m.numpy() for m in a]))[2][:7])
    cores = [u.T @ delta[f"{module}.weight"] @ v.T for delta in deltas[:2]]
    wanted = u @ ties(cores, [0.7, 0.3], 0.5) @ v
    assert float((mine[module] - wanted).abs().max()) < 1e-6


def test_ties_by_knots_is_the_papers_arithmetic_on_the_right_vectors(
    made: Any, tmp_path: Path
) -> None:
    _, folders, deltas = made
    words = ("--method", "knots", "--operator", "ties", "--set", "density=0.5", "--set", "lambda=2")
    merge(*folders, tmp_path / "out", *words)
    mine, module = deltas_of(tmp_path / "out"), "model.layers.1.mlp.down_proj"
    found = [delta[f"{module}.weight"].numpy() for delta in deltas]
    u, s, v = np.linalg.svd(np.concatenate(found, axis=1), full_matrices=False)
    count = int((s > 1e-5 * s[0]).sum())  # of 6: the second adapter does not change it
    parts = np.split(s[:count, None] * v[:count], 3, axis=1)
    kept = ties([torch.from_numpy(part.copy()) for part in parts], [1.0, 1.0, 1.0], 0.5)
    wanted = 2 * torch.from_numpy(u[:, :count]) @ kept
    assert count == 6
    assert float((mine[module] - wanted).abs().max()) < 1e-6


def test_a_core_merge_can_be_cut_and_said_in_a_plan(made: Any, tmp_path: Path) -> None:
    _, folders, _ = made
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "merge_method: ties\n"
        "parameters: {density: [0.5, 1.0]}\n"  # a gradient over the layers
        "models:\n"
        f"  - model: {folders[0]}\n    parameters: {{weight: 0.7}}\n"
        f"  - model: {folders[1]}\n    parameters: {{weight: 0.3}}\n"
    )
    report = merge("--plan", plan, tmp_path / "out", "--method", "core", "--rank", 2)
    assert {matrix["rank"] for matrix in report["matrices"]} <= {1, 2}
    whole = merge("--plan", plan, tmp_path / "whole", "--method", "core")
    shares = [m["energy"] for m in report["matrices"]]
    mine, uncut = deltas_of(tmp_path / "out"), deltas_of(tmp_path / "whole")
    for module, share in zip(mine, shares, strict=True):
        squares = np.linalg.svd(uncut[module].numpy())[1] ** 2
        assert share == pytest.approx(squares[:2].sum() / squares.sum(), abs=1e-6)
    words = ("--method", "core", "--operator", "ties", "--set", "density=[0.5, 1.0]")
    again = merge(*folders[:2], tmp_path / "again", *words, *weighted([0.7, 0.3]))
    assert again["matrices"] == whole["matrices"]
    one, other = (tmp_path / out / "adapter_model.safetensors" for out in ("whole", "again"))
    assert one.read_bytes() == other.read_bytes()


def test_every_operator_that_takes_two_models_merges_cores(made: Any, tmp_path: Path) -> None:
    _, folders, _ = made
    for name in ("linear", "dare_ties", "model_stock", "karcher", "sce", "breadcrumbs", "della"):
        needs = method(name).model_fields
        words = ["--set", "density=0.7"] if "density" in needs else []
        out = tmp_path / name
        merge(*folders[:2], out, "--method", "core", "--operator", name, *words)
        assert deltas_of(out)


def test_embedding_tables_and_conv1d_layers_add_up(tmp_path: Path) -> None:
    base = tiny_gpt2(tmp_path / "base")
    words = {"r": 3, "lora_alpha": 5, "target_modules": ["c_attn", "c_proj", "wpe"]}
    both = ({}, {"use_rslora": True, "r": 2})
    homes = [tmp_path / name for name in "ab"]
    deltas = [
        trained(base, home, i, **{**words, **more, "fan_in_fan_out": True})
        for i, (home, more) in enumerate(zip(homes, both, strict=True))
    ]
    merge(*homes, tmp_path / "out", *weighted([0.25, 2]))
    merged = with_adapter(base, tmp_path / "out").double().merge_and_unload().state_dict()
    wanted = summed(base, deltas, [0.25, 2]).state_dict()
    for name, tensor in wanted.items():
        assert float((merged[name] - tensor).abs().max()) < 1e-6, name
    assert float(deltas[0]["transformer.wpe.weight"].abs().max()) > 1e-3
    mine = adapted(open_source(str(base)), open_adapter(str(tmp_path / "out")))
    name = "transformer.h.0.attn.c_proj.weight"
    assert float((mine.tensor(name) - wanted[name]).abs().max()) < 1e-6


def test_tensors_held_whole_come_along_only_where_their_merge_is_one_of_them(
    tmp_path: Path,
) -> None:
    base = tiny_llama(tmp_path / "base")
    homes = [tmp_path / name for name in "ab"]
    more: list[dict[str, Any]] = [{"modules_to_save": ["lm_head"]}, {}]
    deltas = [
        trained(base, home, i, r=2, target_modules=["q_proj"], **words)
        for i, (home, words) in enumerate(zip(homes, more, strict=True))
    ]
    report = merge(*homes, tmp_path / "out", *weighted([1, 0.5]))
    assert report["carried_over"] == ["lm_head.weight"]
    mine = logits(with_adapter(base, tmp_path / "out"))
    assert float((mine - logits(summed(base, deltas, [1, 0.5]))).abs().max()) < 1e-6
    told = run(*homes, tmp_path / "b2", *weighted([0.5, 0.5]), "--quiet", fails=4)
    assert "lm_head.weight: held whole and of weight 0.5" in told and "--others skip" in told
    left = merge(*homes, tmp_path / "b3", "--weight", 0.5, "--others", "skip")
    assert list(left["left_out"]) == ["lm_head.weight"]
    assert any("left out: lm_head.weight" in note for note in left["notes"])
    trained(base, tmp_path / "c", 9, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    told = run(homes[0], tmp_path / "c", tmp_path / "b4", "--weight", 0.5, "--quiet", fails=4)
    assert "different in the adapters" in told and "BASE+ADAPTER in a plan" in told
    words = ("--method", "core", "--operator", "ties", "--quiet")
    assert "not in all adapters" in run(*homes, tmp_path / "b5", *words, fails=4)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_of_one_adapter_come_along(tmp_path: Path, bias: str) -> None:
    base = tiny_gpt2(tmp_path / "base")
    homes = [tmp_path / name for name in "ab"]
    deltas = [
        trained(base, home, i, r=2, target_modules=modules, fan_in_fan_out=True, bias=words)
        for i, (home, modules, words) in enumerate(
            [(homes[0], ["c_attn"], bias), (homes[1], ["c_attn", "c_fc"], "none")]
        )
    ]
    report = merge(*homes, tmp_path / "out", *weighted([1, 2]))
    assert "transformer.h.1.attn.c_attn.bias" in report["carried_over"]
    mine = logits(with_adapter(base, tmp_path / "out"))
    assert float((mine - logits(summed(base, deltas, [1, 2]))).abs().max()) < 1e-6


def write(folder: Path, tensors: dict[str, Tensor], **words: Any) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up"], **words}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def factors(out: int = 6, inputs: int = 4, module: str = "up", sign: float = 1.0) -> Any:
    generator = torch.Generator().manual_seed(out)
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(2, inputs, generator=generator),
        f"{PREFIX}{module}.lora_B.weight": sign * torch.randn(out, 2, generator=generator),
    }


def dora(home: Path) -> Path:
    magnitude = {f"{PREFIX}up.lora_magnitude_vector": torch.ones(6)}
    return write(home / "b", factors() | magnitude, use_dora=True)


def biased(home: Path) -> Path:
    bias = {f"{PREFIX}up.lora_B.bias": torch.ones(6)}
    return write(home / "b", factors() | bias, lora_bias=True)


def broken(home: Path) -> Path:
    tensors = factors(7, 4, "down")
    tensors[f"{PREFIX}down.lora_B.weight"][3, 1] = torch.inf
    return write(home / "b", tensors)


@pytest.mark.parametrize(
    ("other", "words", "code", "said"),
    [
        (dora, [], 4, "is DoRA (use_dora)"),
        (biased, [], 4, "adds biases to its layers (lora_bias)"),
        (broken, [], 5, "holds inf at element 7"),
        (
            broken,
            ["--method", "core", "--operator", "ties", "--set", "densty=1"],
            3,  # before a weight is read
            "densty",
        ),
        (lambda home: write(home / "b", factors(7)), [], 4, "goes from 4 to 6 in"),
        (lambda home: write(home / "b", factors(module="model.up")), [], 4, "two names"),
        (lambda home: write(home / "b", factors(), r=3), [], 4, "its rank is 3 by"),
        (lambda home: write(home / "b", factors(sign=-1.0)), [], 5, "zero in all 1 modules"),
        (lambda home: home / "a", [], 3, "named twice"),
        (lambda home: home / "nowhere", [], 4, "no such folder"),
        (lambda home: write(home / "b", factors()), ["--rank", 2], 3, "--method svd takes"),
        (lambda home: write(home / "b", factors()), ["--method", "svd"], 3, "needs --rank or"),
        (lambda home: write(home / "b", factors()), ["--method", "core"], 3, "--operator"),
        (
            lambda home: write(home / "b", factors()),
            ["--method", "core", "--operator", "tiez"],
            3,
            "did you mean 'ties'",
        ),
        (
            lambda home: write(home / "b", factors()),
            ["--method", "core", "--operator", "ties", "--set", "densty=0.2"],
            3,
            "densty",
        ),
        (
            lambda home: write(home / "b", factors()),
            ["--method", "core", "--operator", "ties", "--set", "density=2"],
            3,
            "density",
        ),
        (lambda home: write(home / "b", factors()), ["--operator", "ties"], 3, "--method core"),
        (lambda home: write(home / "b", factors()), ["--set", "density"], 3, "KEY=VALUE"),
        (
            lambda home: write(home / "b", factors()),
            ["--weight", 1, "--weight", 2, "--weight", 3],
            3,
            "3 weights for 2 adapters",
        ),
        (lambda home: write(home / "b", factors()), ["--weight", "nan"], 3, "is no number"),
        (lambda home: write(home / "b", factors()), ["--memory", "1kB"], 5, "raise --memory"),
        (lambda home: write(home / "b", factors()), ["--weight", 0], 5, "zero in all 1 modules"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_leaves_nothing(
    tmp_path: Path, other: Any, words: Any, code: int, said: str
) -> None:
    first = write(tmp_path / "a", factors())
    second = other(tmp_path)
    told = run(first, second, tmp_path / "out", *words, "--quiet", fails=code)
    assert said in told and told.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: ties\nbase_model: x\nmodels: [{model: a}]\n", "'base_model' means nothing"),
        ("merge_method: ties\nmodels: []\n", "lists the adapters"),
        ("merge_method: ties\nmodels: [{modle: a}]\n", "models[0] holds"),
        ("merge_method: tiez\nmodels: [{model: a}, {model: b}]\n", "did you mean 'ties'"),
        ("models: [{model: a}, {model: b}]\n", "--operator"),
        ("merge_method: [\n", "plan.yaml:"),
        ("merge_method: ties\nmodels: [{model: a}, {model: b}]\nthen: [linez]\n", "linez"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", factors())
    write(tmp_path / "b", factors(), lora_alpha=1)
    (tmp_path / "plan.yaml").write_text(text)
    assert said in run("--plan", "plan.yaml", "out", "--quiet", fails=3)
    assert not list(tmp_path.glob("out*"))


def test_an_adapter_is_not_replaced_where_the_folder_to_be_made_was_forgotten(
    tmp_path: Path,
) -> None:
    one, other = write(tmp_path / "a", factors()), write(tmp_path / "b", factors())
    before = (other / "adapter_config.json").read_bytes()
    told = run(one, other, "--overwrite", "--quiet", fails=6)
    assert "comes after the adapters" in told
    assert (other / "adapter_config.json").read_bytes() == before


def test_what_a_killed_run_left_is_told_and_replaced_when_asked(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a", factors()), write(tmp_path / "b", factors(), r=2)
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part/mergekit_ft.spool").write_bytes(b"half")
    told = run(one, other, tmp_path / "out", "--quiet", fails=6)
    assert "a stopped run left; --overwrite starts again" in told
    merge(one, other, tmp_path / "out", "--overwrite")
    (tmp_path / "out2.part").mkdir()
    (tmp_path / "out2.part/mine.txt").write_text("precious")
    told = run(one, other, tmp_path / "out2", "--overwrite", "--quiet", fails=6)
    assert "is in the way" in told and (tmp_path / "out2.part/mine.txt").exists()


def test_modules_that_cancel_have_no_factors_and_are_named(tmp_path: Path) -> None:
    one = write(tmp_path / "a", factors() | factors(5, 3, "down"))
    other = write(tmp_path / "b", factors(sign=-1.0))
    report = merge(one, other, tmp_path / "out")
    assert report["vanished"] == ["up"]
    assert [matrix["module"] for matrix in report["matrices"]] == ["down"]
    assert any("zero in the merge" in note for note in report["notes"])


def test_the_same_merge_has_the_same_bytes(made: Any, tmp_path: Path) -> None:
    _, folders, _ = made
    words = ("--method", "core", "--operator", "dare_ties", "--set", "density=0.5")
    for out in ("one", "two"):
        merge(*folders, tmp_path / out, *words)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
