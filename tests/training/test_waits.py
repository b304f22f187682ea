"""What a step costs beside its arithmetic: collectives, and reads that wait for the device."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from diffmoe.config import Config
from tests.helpers.runs import pack, run_config, train

STEPS = 4
READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__")


class Counting:
    """Counts, step by step, what the run itself (not DeepSpeed) asks of ranks and device."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rank: int) -> None:
        import sys

        import torch
        import torch.distributed as dist

        from diffmoe.training.step import TrainingStep
        from diffmoe.training.telemetry import Telemetry

        steps: list[Counter[str]] = [Counter()]

        def counted(owner: Any, name: str) -> None:
            function = getattr(owner, name)

            def counting(*args: Any, **kwargs: Any) -> Any:
                caller = sys._getframe(1).f_globals["__name__"]
                # Data is read where it lies, on the CPU.
                if caller.startswith("diffmoe.") and not caller.startswith("diffmoe.data."):
                    steps[-1][name] += 1
                return function(*args, **kwargs)

            setattr(owner, name, counting)

        counted(dist, "all_reduce")
        for name in READS:
            counted(torch.Tensor, name)
        run, step = TrainingStep.run, Telemetry.step
        end = self.folder / f"counts-{rank}.json"

        def began(*args: Any, **kwargs: Any) -> Any:
            steps.append(Counter())
            return run(*args, **kwargs)

        def ended(*args: Any) -> None:
            step(*args)
            end.write_text(json.dumps(steps[1:]))

        TrainingStep.run, Telemetry.step = began, ended


def counts(folder: Path, config: Config, world: int) -> list[dict[str, int]]:
    pack(folder / "data")
    train(config, world, prepare=Counting(folder))
    return json.loads((folder / f"counts-{world - 1}.json").read_text())


@pytest.mark.parametrize("every", [1, STEPS])
def test_one_collective_a_step_tells_losses_thresholds_and_routing(tmp_path: Path, every: int):
    config = run_config(
        tmp_path, STEPS, parallel__expert_parallel=2, logging__log_samples=8 * every
    )
    told = counts(tmp_path, config, world=2)
    assert [step["all_reduce"] for step in told] == [1] * STEPS


def test_the_loop_reads_from_the_device_only_where_it_reads_metrics(tmp_path: Path):
    config = run_config(tmp_path, STEPS, logging__log_samples=8 * STEPS)
    told = counts(tmp_path, config, world=1)
    assert len(told) == STEPS
    for number, step in enumerate(told, 1):
        reads = {name: step.get(name, 0) for name in READS}
        if number == STEPS:  # the only one with metrics: nine of routing, and the thresholds
            reads["tolist"] -= 10
        # The flags, and the losses with the gradient norm: of the step before, which are there. The
        # first step shows its own, and the second shows those again.
        assert reads == {**dict.fromkeys(READS, 0), "tolist": 1 if number == 2 else 2}, number
