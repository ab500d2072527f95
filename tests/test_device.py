"""Where the arithmetic is done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergekit_ft import engine
from mergekit_ft.blocks import Span, Station, load
from mergekit_ft.engine import resolve_plan
from mergekit_ft.errors import OperatorError
from mergekit_ft.options import Options
from tests.small_models import arithmetic, cli, merged, same_bytes, tensors, three, write_models


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in a folder with ./base, ./maths and ./chat."""
    monkeypatch.setenv("MERGEKIT_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path)


def without_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def refused(device: str) -> str:
    result = cli("merge", "-", "out", "--device", device, text=arithmetic())
    assert result.exit_code == 5, result.output
    assert not Path("out").exists() and not Path("out.part").exists()
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda:-1", "", "0"])
def test_a_device_that_does_not_exist_is_refused_with_those_that_do(device: str) -> None:
    assert refused(device) == (
        f"error: no device is called {device!r}; use cpu, cuda, cuda:N or mps"
    )


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_where_there_is_none_is_refused_before_any_byte(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_accelerators(monkeypatch)
    said = f"error: {device}: torch sees no CUDA device here; use --device cpu"
    assert refused(device) == said


@pytest.mark.parametrize("device", ["mps", "meta", "xpu"])
def test_what_else_torch_knows_is_refused_before_any_byte(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_accelerators(monkeypatch)
    assert device in refused(device)


def test_a_cuda_device_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(OperatorError, match="cuda:3"):
        _ = Options(device="cuda:3").torch_device


@pytest.mark.parametrize(
    ("cuda", "mps", "device"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_the_best_there_is(
    cuda: bool, mps: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert Options(device="auto").torch_device.type == device


def test_auto_and_cpu_are_one_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    without_accelerators(monkeypatch)
    merged(arithmetic(), "a", "--device", "auto")
    merged(arithmetic(), "b", "--device", "cpu")
    assert len(same_bytes(tensors("a"), tensors("b"))) == 12


def test_two_workers_serve_a_gpu_and_one_a_core_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert Options(device="cuda").workers == 2
    assert Options(device="cpu").workers == 8
    assert Options(device="cuda", threads=5).workers == 5


class Stream:
    """Counts how often somebody waits for it."""

    def __init__(self, device: object = None) -> None:
        self.waits = 0

    def synchronize(self) -> None:
        self.waits += 1


def test_a_station_of_a_gpu_pins_its_staging_and_waits_before_it_is_refilled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned: list[bool] = []
    empty = torch.empty

    def on_the_cpu(*given: object, **named: object) -> torch.Tensor:
        pinned.append(bool(named.pop("pin_memory", False)))
        named.pop("device", None)
        return empty(*given, **named)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", on_the_cpu)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    station = Station(torch.device("cuda"))
    resolution = resolve_plan(three("ties", "weight: 0.5"), Options())
    task = resolution.merged[0]
    block = load(station, task, Span(0, task.numel))
    resolution.close()
    assert isinstance(station.stream, Stream) and station.stream.waits == len(task.tuned)
    assert any(pinned)
    for row, name in enumerate(("maths", "chat")):
        assert torch.equal(block.tuned[row], tensors(name)[task.name].flatten())
    assert torch.equal(block.base, tensors("base")[task.name].flatten())


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties"])
def test_a_gpu_gives_what_the_cpu_gives_within_one_unit_in_the_last_place(method: str) -> None:
    density = "" if method == "task_arithmetic" else ", density: 0.5"
    plan = three(method, f"weight: 0.5{density}")
    engine.merge(plan, "gpu", device="auto")
    engine.merge(plan, "cpu", device="cpu")
    gpu, cpu = tensors("gpu"), tensors("cpu")
    assert Options(device="auto").torch_device.type != "cpu"
    for name, values in cpu.items():
        ulp = torch.nextafter(values.abs(), torch.tensor(torch.inf)) - values.abs()
        assert bool(((gpu[name] - values).abs() <= ulp).all()), name
