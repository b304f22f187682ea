"""What is counted and kept besides time: calls of a turn, kernels, waits, traces, bytes, ranks."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from diffmoe.benchmarks.profiling import Use, add_use, profiled, waits
from diffmoe.benchmarks.ranks import on_ranks, rank_device
from diffmoe.benchmarks.report import Report
from diffmoe.benchmarks.steps import least_traffic
from diffmoe.benchmarks.timing import calls_of_a_turn, take_turns
from diffmoe.models.dit import DiT
from diffmoe.models.matrices import hidden_matrices
from diffmoe.planning.layouts import Layout
from tests.helpers.devices import GPU
from tests.helpers.tiny import tiny_config

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_works_take_turns_after_a_round_that_does_not_count():
    done: list[str] = []
    works = {name: partial(done.append, name) for name in "ab"}
    timed = take_turns(works, 2, CPU)
    assert done == ["a", "b"] * 3
    assert {name: len(seconds) for name, seconds in timed.seconds.items()} == {"a": 2, "b": 2}
    done.clear()
    timed = take_turns(works, 2, CPU, calls=2)
    assert done == ["a", "a", "b", "b"] * 3
    assert len(timed.seconds["a"]) == 2


def test_short_work_fills_a_turn_of_a_gpu():
    assert [calls_of_a_turn(seconds) for seconds in (1.0, 0.02, 0.008, 0.0)] == [1, 1, 3, 100]


@pytest.mark.parametrize("calls", [pytest.param(calls, marks=GPU) for calls in (1, 2)])
def test_a_gpus_turn_counts_one_of_its_calls(calls: int):
    x, done = torch.randn(64, 64, device=CUDA), []

    def work() -> None:
        done.append(x @ x)

    timed = take_turns({"product": work}, 2, CUDA, calls)
    assert len(timed.seconds["product"]) == 2
    assert (len(done) == 6) == (calls == 2)  # else it was repeated


def event(name: str, microseconds: int, **fields: object) -> FunctionEvent:
    fields = {"device_type": DeviceType.CUDA, **fields}
    return FunctionEvent(0, name, 0, 100, 100 + microseconds, **fields)


def test_only_what_the_gpu_does_is_its_use():
    use = Use.of(
        [
            event("sm90_xmma_gemm", 30),
            event("elementwise_kernel", 5),
            event("Memcpy HtoD (Pinned -> Device)", 2),
            event("Memset (Device)", 1),
            event("Optimizer.step#AdamW.step", 40, is_user_annotation=True),
            event("aten::mm", 50, device_type=DeviceType.CPU),
        ]
    )
    assert use == Use(kernels=2, copies=2, busy=pytest.approx(38e-6))


def test_a_trace_holds_the_operations_of_one_call(tmp_path: Path, device: torch.device):
    x = torch.randn(8, 8, device=device)
    trace = tmp_path / "trace.json"
    events = profiled(lambda: x @ x, device, trace)
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("aten::mm") == 1
    assert "aten::mm" in [event.name for event in events]
    assert (Use.of(events).kernels > 0) == (device.type == "cuda")


def test_what_a_cpu_cannot_count_is_told_once(tmp_path: Path):
    report = Report("benchmark", {})
    for name in ("ours", "dense"):
        add_use(report, name, lambda: None, CPU)
    assert report.figures == []
    assert report.table().count("kernels, copies and waits for the device: only on a GPU") == 1
    report.write(tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["notes"] == report.notes


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_waits_for_a_gpu_are_counted_one_by_one(device: str):
    x = torch.ones(4, device=device)
    assert waits(lambda: x + x) == 0
    assert waits(lambda: [x.sum().item() for _ in range(2)]) == 2
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.parametrize(("precision", "weight"), [("fp32", 4), ("bf16", 2)])
def test_a_step_moves_at_least_weights_gradients_and_state(precision: str, weight: int):
    config = tiny_config(training__precision=precision)
    parameters = sum(one.numel() for one in DiT(config.model, config.moe).parameters())
    averages = (config.training.ema_decay is not None) + len(config.training.ema_stds)
    # Read twice and written; fp32 gradients, written and read; masters, two moments, averages.
    each = 3 * weight + 2 * 4 + 2 * 4 * (3 + averages)
    assert least_traffic(Layout(config, 1, 1)) == parameters * each
    muon = config.replace({"optimizer.type": "muon"})
    stacks = hidden_matrices(DiT(config.model, config.moe)).values()
    saved = 2 * 4 * sum(stack.number * stack.size for stack in stacks)
    assert least_traffic(Layout(muon, 1, 1)) == parameters * each - saved


def seen_by_rank() -> tuple[str, int, int, str | None]:
    total = torch.ones(1)
    dist.all_reduce(total)
    gpus = torch.cuda.device_count()
    return rank_device().type, int(total), gpus, os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize("visible", [None, "0"])
def test_ranks_with_fewer_gpus_than_ranks_see_none(
    monkeypatch: pytest.MonkeyPatch, visible: str | None
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if torch.cuda.device_count() > 1:
        pytest.skip("each rank has a GPU of its own")
    assert on_ranks(2, seen_by_rank) == ("cpu", 2, 0, "")
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
