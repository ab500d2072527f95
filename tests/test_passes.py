"""The passes: the same bits however they are cut, and nothing that is not a number gets by."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import mergekit_ft
from mergekit_ft import passes
from mergekit_ft.blocks import Crew, Span, block_bytes
from mergekit_ft.contract import CELL, Block, Grain, Measure, Operator, Place
from mergekit_ft.errors import MergekitError, OperatorError
from mergekit_ft.passes import Passes
from mergekit_ft.resolution import Task
from tests.checkpoints import write_checkpoint

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Tensors = Mapping[str, Tensor]

WEIGHTS = {"weight": 0.4}
SPARSE = {"weight": 0.4, "density": 0.3}
# name: method, how many models besides the base, parameters, operators under `then:`
PLANS: dict[str, tuple[str, int, dict[str, Any], list[Any]]] = {
    "linear": ("linear", 2, WEIGHTS, []),
    "linear, summed": ("linear", 2, {"weight": 0.5, "normalize": False}, []),
    "slerp": ("slerp", 1, {"t": 0.3}, []),
    "task_arithmetic": ("task_arithmetic", 2, WEIGHTS, []),
    "ties": ("ties", 2, SPARSE | {"rescale": True}, []),
    "ties, whole model": ("ties", 2, SPARSE | {"scope": "model", "rescale": True}, []),
    "dare_linear": ("dare_linear", 2, SPARSE, []),
    "dare_ties": ("dare_ties", 2, SPARSE | {"rescaling": "density"}, []),
    "lines": ("lines", 1, {"gamma": 0.4}, []),
    "slerp, then lines": ("slerp", 1, {"t": 0.7}, [{"lines": {"gamma": 0.4}}]),
    "linear, then lines": ("linear", 2, WEIGHTS, [{"lines": {"alpha": 0.3, "beta": 0.5}}]),
}
AUTO = [{"lines": {"alpha": "auto", "beta": 0.5}}]
AUTOMATIC = {
    "ties, then lines": ("ties", 2, SPARSE, AUTO),
    "dare_ties, then lines": ("dare_ties", 2, SPARSE, AUTO),
    "whole-model ties, then lines": ("ties", 2, SPARSE | {"scope": "model"}, AUTO),
}
ALL = PLANS | AUTOMATIC


def plan(name: str, home: Path) -> dict[str, Any]:
    """Return a plan over ./base, ./m0 and ./m1; linear takes the base for one of the models."""
    method, k, parameters, then = ALL[name]
    found: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(home / f"m{i}")} for i in range(k)],
        "parameters": parameters,
        "base_model": str(home / "base"),
    }
    return found | ({"then": then} if then else {})


def checkpoints(home: Path, base: Tensors, *tuned: Tensors, **config: Any) -> Path:
    for name, tensors in (("base", base), *((f"m{i}", t) for i, t in enumerate(tuned))):
        write_checkpoint(home / name, tensors, config=config)
    return home


def merged(plan: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    with mergekit_ft.open_plan(plan, **options) as tensors:
        return dict(tensors)


def bits(tensors: Tensors) -> dict[str, str]:
    """Return, by name, what only the same bits share."""
    views = {name: t.contiguous().view(-1).view(BITS[t.itemsize]) for name, t in tensors.items()}
    return {
        name: f"{tensors[name].dtype} {hashlib.sha256(view.numpy().tobytes()).hexdigest()}"
        for name, view in views.items()
    }


def random_tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    rolls = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (CELL + 3, 2),
        "model.layers.0.w": (3 * CELL + 17,),
        "model.layers.1.w": (7, 11),
        "model.layers.1.b": (),
        "lm_head.weight": (5, 4 * CELL // 5),
    }
    return {name: torch.randn(shape, generator=rolls).to(dtype) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base and two models near it, with tensors of less and of more than a cell."""
    folder = tmp_path_factory.mktemp("models")
    base = random_tensors(0)
    near = [{n: base[n] + 0.1 * t for n, t in random_tensors(seed).items()} for seed in (1, 2)]
    return checkpoints(folder, base, *near)


# --- the same bits ------------------------------------------------------------------------------


def size_of(plan: dict[str, Any], **options: Any) -> int:
    with mergekit_ft.open_plan(plan, **options) as tensors:
        return tensors._passes.size


@pytest.mark.parametrize("name", ALL)
def test_neither_blocks_nor_threads_nor_order_move_a_bit(name: str, home: Path) -> None:
    asked = plan(name, home)
    with mergekit_ft.open_plan(asked) as tensors:
        widest = max(block_bytes(task, CELL) for task in tensors.resolution.merged)
    usual = bits(merged(asked, threads=1))
    for threads, cells in ((1, 1), (4, 1), (4, 3), (4, 4)):
        options = {"threads": threads, "memory": widest * cells * threads}
        assert size_of(asked, **options) == cells * CELL
        assert bits(merged(asked, **options)) == usual, options
    with mergekit_ft.open_plan(asked) as tensors:
        assert bits({key: tensors[key] for key in reversed(list(tensors))}) == usual


@pytest.mark.parametrize("name", ALL)
def test_a_merge_that_should_change_every_tensor_does(name: str, home: Path) -> None:
    # without which the test above could not fail
    base = bits(random_tensors(0))
    found = bits(merged(plan(name, home)))
    assert [key for key in base if found[key] == base[key] and key != "model.layers.1.b"] == []


SCRIPT = """
import hashlib, sys
from pathlib import Path
from tests.test_passes import ALL, bits, merged, plan
found = [bits(merged(plan(name, Path(sys.argv[1])))) for name in ALL]
sys.stdout.write(hashlib.sha256(repr(found).encode()).hexdigest())
"""


def test_hash_seeds_move_no_bit(home: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(home)],
            cwd=root,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    one, other = (run.communicate()[0] for run in runs)
    assert len(one) == 64
    assert one == other


def test_rows_of_cells_are_kept_in_order_whoever_comes_first() -> None:
    def start_of(block: Block) -> Tensor:
        return torch.tensor([[block.start]], dtype=torch.float64)

    total = passes._Total(Measure(start_of, cells=True))
    for task, start in ((1, 1), (0, 2 * CELL), (0, 0), (1, 0)):
        rows = torch.zeros(1, 1)
        block = Block("w", (1,), start, rows[0], rows, "a", Place(), 0, rows)
        total.add(task, block)
    assert total.result().tolist() == [[0.0], [2.0 * CELL], [0.0], [1.0]]


# --- equal models, and one model ----------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TRICKY = [-0.0, 0.0, 1.0, -1.0, 1e-7, -6e-8, 0.1, 3e4, -0.3333]


def tricky(dtype: torch.dtype) -> dict[str, Tensor]:
    values = torch.tensor(TRICKY, dtype=dtype)
    return {
        "model.embed_tokens.weight": values.repeat(3),
        "model.layers.0.w": values.view(3, 3),
        "model.layers.1.w": torch.tensor([-0.0, -0.0, 0.0], dtype=dtype),
        "model.layers.2.w": torch.tensor([1e-7, -1e-7], dtype=dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PLANS)
def test_models_equal_to_the_base_merge_to_it_bit_for_bit(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    same = tricky(dtype)
    asked = plan(name, checkpoints(tmp_path, same, same, same))
    if "summed" in name:
        asked["parameters"] = {"weight": 0.5, "normalize": True}
    assert bits(merged(asked)) == bits(same)


ALONE = {
    "linear": {"weight": 1.0},
    "task_arithmetic": {"weight": 1.0},
    "ties": {"weight": 1.0},
    "dare_linear": {"weight": 1.0},
    "dare_ties": {"weight": 1.0},
    "slerp": {"t": 1.0},
    "lines": {"alpha": 1.0, "beta": 0.0},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ALONE)
def test_one_model_at_weight_1_comes_out_bit_for_bit(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = {name: tensor.flip(0) * 3 for name, tensor in tricky(dtype).items()}
    tuned = tricky(dtype)
    home = checkpoints(tmp_path, base, tuned)
    asked: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(home / "m0")}],
        "parameters": ALONE[method],
    }
    if method != "linear":
        asked["base_model"] = str(home / "base")
    assert bits(merged(asked)) == bits(tuned)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear"])
def test_models_that_are_not_heard_change_nothing(method: str, home: Path) -> None:
    models = [
        {"model": str(home / "m0"), "parameters": {"weight": 1.0}},
        {"model": str(home / "m1"), "parameters": {"weight": 0.0}},
    ]
    asked: dict[str, Any] = {"merge_method": method, "models": models}
    if method != "linear":
        asked["base_model"] = str(home / "base")
    base, near = random_tensors(0), random_tensors(1)
    assert bits(merged(asked)) == bits({n: base[n] + 0.1 * near[n] for n in base})


# --- what is no number --------------------------------------------------------------------------


def with_one(value: float, where: int, dtype: torch.dtype = torch.float32) -> Tensors:
    tensor = torch.linspace(-1, 1, CELL + 100, dtype=dtype)
    tensor[where] = value
    return {"model.layers.0.w": torch.ones(2, dtype=dtype), "model.layers.1.w": tensor}


def plain(dtype: torch.dtype = torch.float32) -> Tensors:
    return with_one(0.5, 0, dtype)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", PLANS)
def test_what_is_no_number_is_refused_by_source_tensor_and_element(
    name: str, value: str, tmp_path: Path
) -> None:
    home = checkpoints(tmp_path, plain(), with_one(float(value), CELL + 7), plain())
    asked = plan(name, home)
    if asked["merge_method"] == "lines":  # its last block would be a copy
        asked["parameters"] = {"alpha": 0.5, "beta": 0.1}
    with pytest.raises(OperatorError) as error:
        merged(asked)
    told = str(error.value)
    assert told.startswith(f"{home / 'm0'}: model.layers.1.w holds {value} at element {CELL + 7};")


def test_what_is_no_number_in_the_base_is_the_base_s(tmp_path: Path) -> None:
    home = checkpoints(tmp_path, with_one(float("nan"), 3), plain(), plain())
    with pytest.raises(OperatorError, match=r"base: model\.layers\.1\.w holds nan at element 3"):
        merged(plan("task_arithmetic", home))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_what_is_no_number_is_seen_in_a_tensor_that_is_copied(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    home = checkpoints(tmp_path, plain(dtype), with_one(float("inf"), CELL, dtype))
    asked = plan("lines", home)
    asked["parameters"] = {"gamma": 0.5}
    with pytest.raises(
        OperatorError, match=rf"m0: model\.layers\.1\.w holds inf at element {CELL}"
    ):
        merged(asked)


def test_what_is_no_number_passes_where_that_is_asked_for(tmp_path: Path) -> None:
    home = checkpoints(tmp_path, plain(), with_one(float("nan"), 3), plain())
    found = merged(plan("task_arithmetic", home), allow_non_finite=True)["model.layers.1.w"]
    assert found.isnan().nonzero().tolist() == [[3]]


def test_a_merged_value_too_large_to_store_is_refused(tmp_path: Path) -> None:
    # 40,000 + 2 * 20,000 = 80,000, above float16's 65,504
    base, tuned = ({"w": torch.tensor([1.0, x], dtype=torch.float16)} for x in (40_000.0, 60_000.0))
    asked = plan("task_arithmetic", checkpoints(tmp_path, base, tuned, tuned))
    asked["parameters"] = {"weight": 1.0}
    with pytest.raises(OperatorError, match=r"w: the merged value of element 1 does not fit F16"):
        merged(asked)
    stored = merged(asked | {"dtype": "float32"})["w"]
    assert stored.tolist() == [1.0, 80_000.0]


def test_a_copied_value_too_large_to_store_is_refused(tmp_path: Path) -> None:
    tensors = {"w": torch.tensor([1.0, 1e6])}
    asked = plan("lines", checkpoints(tmp_path, {"w": torch.zeros(2)}, tensors))
    asked |= {"parameters": {"alpha": 1.0, "beta": 0.0}, "dtype": "float16"}
    with pytest.raises(OperatorError, match="element 1 does not fit F16"):
        merged(asked)


# --- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # float32 has no number between 1 and 1 + 2**-23
        ("task_arithmetic", 1 + 2**-40),
        ("linear", 1 + 2**-41),
        ("slerp", 1 + 2**-41),
        ("ties", 1 + 2**-40),
        ("dare_linear", 1 + 2**-40),
        ("lines", 1 + 2**-41),
    ],
)
def test_float64_sources_are_computed_in_float64(
    name: str, expected: float, tmp_path: Path
) -> None:
    base = {"w": torch.ones(4, dtype=torch.float64)}
    tuned = {"w": torch.full((4,), 1 + 2**-40, dtype=torch.float64)}
    home = checkpoints(tmp_path, base, tuned, tuned)
    asked = plan(name, home)
    # two models of weight 1/2; of three with the base in it, 1/4 + 1/4; half way; half the delta
    models = {"linear": {"weight": 0.25}, "slerp": {"t": 0.5}, "lines": {"gamma": 0.5}}
    asked["parameters"] = models.get(name, {"weight": 0.5})
    if name == "linear":
        asked["models"].append({"model": str(home / "base"), "parameters": {"weight": 0.5}})
    found = merged(asked)["w"]
    assert found.dtype == torch.float64
    assert found.tolist() == [expected] * 4


def test_one_rounding_is_made_from_float32_to_what_is_stored(tmp_path: Path) -> None:
    # 1 + 1/2 (2**-8) + 1/2 (2**-7) = 1 + 1.5 * 2**-8: bfloat16 rounds it up to 1 + 2**-7. Rounded
    # after each step, 1 + 2**-9 would have gone down to 1, and 1 + 2**-8 again, to even.
    base, one, other = ({"w": torch.tensor([x])} for x in (1.0, 1 + 2**-8, 1 + 2**-7))
    asked = plan("task_arithmetic", checkpoints(tmp_path, base, one, other))
    asked |= {"parameters": {"weight": 0.5}, "dtype": "bfloat16"}
    found = merged(asked)["w"]
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [1 + 2**-7]


INTEGERS = [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool]


def with_integers(dtype: torch.dtype, *values: int) -> Tensors:
    return {"w": torch.tensor([1.0, float(values[0])]), "n": torch.tensor(values, dtype=dtype)}


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "slerp"])
def test_integers_are_copied(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    home = checkpoints(tmp_path, *(with_integers(dtype, 1, 0, 1) for _ in range(3)))
    found = merged(plan(name, home) | {"dtype": "bfloat16"})["n"]
    assert bits({"n": found}) == bits({"n": torch.tensor([1, 0, 1], dtype=dtype)})


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_that_differ_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = with_integers(dtype, 1, 0, 1), with_integers(dtype, 1, 0, 0)
    home = checkpoints(tmp_path, tensors[0], *tensors)
    with pytest.raises(
        OperatorError, match=r"n: \w+ values do not merge, and those of .*m1 differ"
    ):
        merged(plan("task_arithmetic", home))


@pytest.mark.parametrize("one", INTEGERS)
@pytest.mark.parametrize("other", INTEGERS)
def test_integers_of_other_kinds_are_refused_in_words(
    one: torch.dtype, other: torch.dtype, tmp_path: Path
) -> None:
    if one == other:
        return
    tensors = with_integers(one, 1, 0, 1), with_integers(other, 1, 0, 1)
    with pytest.raises(MergekitError, match=r"\bn\b"):
        merged(plan("lines", checkpoints(tmp_path, *tensors)))


@pytest.mark.parametrize("name", PLANS)
def test_a_tensor_without_elements_stays_one(name: str, tmp_path: Path) -> None:
    tensors = [{"w": torch.tensor([x, 2 * x]), "none": torch.empty(0, 3)} for x in (1.0, 2.0, 4.0)]
    found = merged(plan(name, checkpoints(tmp_path, *tensors)))["none"]
    assert (found.shape, found.dtype) == ((0, 3), torch.float32)


# --- ties ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_a_tied_head_is_its_embedding_under_randomness_too(
    name: str, tied: bool, tmp_path: Path
) -> None:
    tensors = []
    for seed in range(3):
        embedding = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))
        tensors.append({"model.embed_tokens.weight": embedding, "lm_head.weight": embedding})
    home = checkpoints(tmp_path, *tensors, model_type="llama", tie_word_embeddings=tied)
    found = merged(plan(name, home))
    same = torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert same == tied  # untied, each has a mask of its own


def test_parameters_of_one_tensor_change_no_other(home: Path) -> None:
    asked = plan("dare_ties", home)
    usual = bits(merged(asked))
    own = [{"filter": "layers.0", "value": 0.6}, {"value": 0.3}]
    changed = bits(merged(asked | {"parameters": {**asked["parameters"], "density": own}}))
    assert {name for name in usual if usual[name] != changed[name]} == {"model.layers.0.w"}


# --- the crew -----------------------------------------------------------------------------------


class Recording(Operator):
    """Copies the first model, noting its blocks; may fail."""

    seen: ClassVar[list[tuple[str, int, int, tuple[int, ...]]]] = []
    fails_at: ClassVar[str | None] = None

    def merge(self, block: Block, finding: Any) -> Tensor:
        self.seen.append((block.name, block.start, block.n, block.shape))
        if block.name == self.fails_at:
            raise OperatorError("this one fails")
        return block.tuned[0].sub_(block.base)


class Whole(Recording):
    """The same, over whole tensors."""

    grain: ClassVar[Grain] = Grain.TENSOR


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    Recording.seen.clear()
    Recording.fails_at = None


class Sink:
    """Forgets what it is given, and remembers what was finished."""

    def __init__(self) -> None:
        self.changed: dict[str, bool] = {}

    def put(self, task: Task, span: Span, out: Tensor) -> None:
        pass

    def finish(self, task: Task, changed: bool) -> None:
        self.changed[task.name] = changed


def run(plan: dict[str, Any], operator: Operator, threads: int) -> dict[str, bool]:
    sink = Sink()
    with mergekit_ft.open_plan(plan) as tensors:
        tasks = [replace(task, operator=operator, copy=None) for task in tensors.resolution.tasks]
        Passes(tasks, CELL, Crew(threads, torch.device("cpu"))).merge(sink)
    return sink.changed


def test_an_operator_that_needs_whole_tensors_is_given_them(home: Path) -> None:
    run(plan("task_arithmetic", home), Whole(), threads=1)
    shapes = {name: tuple(tensor.shape) for name, tensor in random_tensors(0).items()}
    sizes = {name: tensor.numel() for name, tensor in random_tensors(0).items()}
    assert sorted(Recording.seen) == sorted((n, 0, sizes[n], shapes[n]) for n in shapes)


def test_an_operator_of_elements_is_given_cells(home: Path) -> None:
    run(plan("task_arithmetic", home), Recording(), threads=4)
    blocks = [(start, n) for name, start, n, _ in sorted(Recording.seen) if "layers.0" in name]
    assert blocks == [(0, CELL), (CELL, CELL), (2 * CELL, CELL), (3 * CELL, 17)]


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_in_a_worker_surfaces_once_and_stops_the_rest(
    threads: int, tmp_path: Path
) -> None:
    names = [f"t{i:03}" for i in range(300)]
    for folder, value in (("base", 0.0), ("m0", 1.0), ("m1", 1.0)):
        write_checkpoint(tmp_path / folder, {n: torch.full((4,), value) for n in names}, config={})
    Recording.fails_at = "t005"
    before, alive = torch.get_num_threads(), threading.active_count()
    with pytest.raises(OperatorError, match=r"^this one fails$"):
        run(plan("task_arithmetic", tmp_path), Recording(), threads)
    assert len(Recording.seen) < 300
    assert [name for name, *_ in Recording.seen].count("t005") == 1
    assert (torch.get_num_threads(), threading.active_count()) == (before, alive)


def test_one_block_that_differs_makes_a_tensor_changed_whoever_is_last(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the block that does not differ is looked at first and answered last
    looking, answered = threading.Event(), threading.Event()

    def differs(*asked: Any) -> bool:
        (span,) = (word for word in asked if isinstance(word, Span))
        (task,) = (word for word in asked if isinstance(word, Task))
        if task.name != "model.layers.0.w":
            return False
        if span.start == 0:
            looking.wait(5)
            answered.set()
            return True
        if span.start == CELL:
            looking.set()
            answered.wait(5)
            threading.Event().wait(0.2)
        return False

    monkeypatch.setattr(passes, "_differs", differs)
    changed = run(plan("task_arithmetic", home), Recording(), threads=2)
    assert changed["model.layers.0.w"]


def test_after_ctrl_c_no_worker_is_left_at_work() -> None:
    begun, ended = [], []

    def piece(station: Any) -> None:
        begun.append(1)
        time.sleep(0.4)
        ended.append(1)

    def interrupt() -> None:
        while len(begun) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)  # the crew waits for its workers by now

    other = threading.Thread(target=interrupt)
    other.start()
    with pytest.raises(KeyboardInterrupt):
        Crew(2, torch.device("cpu")).run([iter([[piece, piece, piece]])])
    assert len(begun) == len(ended) == 2
    other.join()


def test_ctrl_c_while_a_worker_starts_leaves_none_behind(monkeypatch: Any) -> None:
    start = threading.Thread.start

    def interrupted(worker: Any) -> None:
        wait = worker._started.wait
        worker._started.wait = lambda *given: (os.kill(os.getpid(), signal.SIGINT), wait(*given))
        start(worker)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Crew(2, torch.device("cpu")).run([iter([[lambda station: time.sleep(0.1)] * 4])])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("merge-")]
