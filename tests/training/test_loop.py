"""The loop's own promises: schedule, periods, accumulation, EMA, steps that are not finite."""

import json
import math
from pathlib import Path

import pytest
import torch

from diffmoe.config import OptimizerConfig
from diffmoe.training.due import crossed
from diffmoe.training.loop import PATIENCE
from diffmoe.training.schedule import learning_rate
from tests.helpers.runs import (
    assert_identical,
    clock,
    metrics,
    newest,
    pack,
    run_config,
    tensors,
    train,
)


def test_learning_rate_warms_up_and_falls_as_half_a_cosine():
    constant = OptimizerConfig(learning_rate=2e-3, warmup_samples=100)
    assert [learning_rate(constant, n, 500) for n in (0, 25, 100, 500)] == [0, 5e-4, 2e-3, 2e-3]
    cosine = OptimizerConfig(learning_rate=2e-3, warmup_samples=100, schedule="cosine")
    rates = [learning_rate(cosine, n, 500) for n in (50, 100, 200, 300, 400, 500)]
    falling = [1, 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4, 0]
    assert rates == pytest.approx([1e-3, *(2e-3 * share for share in falling)], abs=1e-18)
    # A last batch may reach past the end: the cosine must not rise again.
    assert learning_rate(cosine, 520, 500) == 0


def test_learning_rate_is_stable_until_its_decay():
    """1 - sqrt of the share of the decay that is done; another peak has the same shape."""
    schedule = OptimizerConfig(
        learning_rate=2e-3,
        warmup_samples=100,
        schedule="warmup_stable_decay",
        decay_samples=200,
    )
    clocks = (50, 100, 300, 350, 400, 500, 520)
    shares = [0.5, 1, 1, 0.5, 1 - math.sqrt(0.5), 0, 0]
    rates = [learning_rate(schedule, n, 500) for n in clocks]
    assert rates == pytest.approx([2e-3 * share for share in shares], abs=1e-18)
    rates = [learning_rate(schedule, n, 500, peak=0.1) for n in clocks]
    assert rates == pytest.approx([0.1 * share for share in shares], abs=1e-18)


def test_a_period_is_crossed_once_even_if_no_batch_ends_on_it():
    ends = range(8, 81, 8)
    assert [n for n in ends if crossed(20, n - 8, n)] == [24, 40, 64, 80]
    assert [n for n in ends if crossed(8, n - 8, n)] == list(ends)
    assert [n for n in ends if crossed(1, n - 8, n)] == list(ends)


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path):
    """A dense model: 1x8 = 2x4 = 4x2, in losses, gradient norms, moments and weights."""
    pack(tmp_path / "data")
    runs = {}
    for parts in (1, 2, 4):
        config = run_config(
            tmp_path,
            3,
            output=str(tmp_path / f"run{parts}"),
            moe__type="dense",
            data__lanes=2,
            training__accumulation=parts,
            # With eps far above the gradients AdamW is momentum SGD: a wrong factor would show.
            optimizer__eps=1.0,
            optimizer__learning_rate=0.5,
        )
        train(config)
        runs[parts] = metrics(config), tensors(newest(config))
    lines, state = runs[1]
    assert len(lines) == 3
    assert state["weights/final.weight"].abs().max() > 0.01  # it has moved from its zeros
    for parts in (2, 4):
        other_lines, other_state = runs[parts]
        for key in ("loss", "gradient_norm"):
            # fp32 sums in another order, over three steps
            expected = [line[key] for line in lines]
            assert [line[key] for line in other_lines] == pytest.approx(expected, rel=1e-6)
        for name, tensor in state.items():
            torch.testing.assert_close(other_state[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision", "accumulation", "offload", "optimizer"),
    [
        (1, "fp32", 1, False, "adamw"),
        (2, "fp32", 2, False, "adamw"),
        (1, "bf16", 2, False, "adamw"),
        (2, "bf16", 1, False, "muon"),
        (2, "bf16", 2, True, "adamw"),
        (1, "fp32", 1, True, "muon"),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_but_the_clock(
    tmp_path: Path, stage: int, precision: str, accumulation: int, offload: bool, optimizer: str
):
    """One rank's dense gradient, one rank's expert gradient, one rank's loss alone."""
    pack(tmp_path / "data")
    config = run_config(
        tmp_path,
        5,
        training__checkpoint_samples=8,
        training__precision=precision,
        training__accumulation=accumulation,
        parallel__expert_parallel=2,
        parallel__zero_stage=stage,
        optimizer__type=optimizer,
        optimizer__gradient_clipping=0.5,
    )
    ds_config = tmp_path / "ds.json"
    zero = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    ds_config.write_text(json.dumps({"zero_optimization": zero}))
    train(config, world=2, prepare=break_steps, ds_config=str(ds_config))
    checkpoints = [Path(config.output) / f"step-{k:08d}" for k in range(1, 6)]
    states = [tensors(path) for path in checkpoints]
    for state in states[1:4]:
        assert_identical(state, states[0])
    assert all(tensor.isfinite().all() for tensor in states[4].values())
    assert not torch.equal(states[4]["weights/final.weight"], states[0]["weights/final.weight"])
    assert [clock(path)["skipped"] for path in checkpoints] == [0, 1, 2, 3, 3]
    assert [line["skipped_steps"] for line in metrics(config)] == [0, 1, 2, 3, 3]
    # JSON has no infinity: null.
    assert [line["loss"] is not None for line in metrics(config)] == [1, 1, 1, 0, 1]
    told = (Path(config.output) / "told").read_text().splitlines()
    assert [line.split(":")[0] for line in told if "skipped" in line] == [
        "step 2 is skipped (1 so far)",
        "step 3 is skipped (2 so far)",
        "step 4 is skipped (3 so far)",
    ]


def break_steps(rank: int) -> None:
    """On rank 1, step 2 has NaN in a dense gradient, step 3 in an expert's, step 4 a loss of inf.

    That loss has finite gradients. Under accumulation only the first micro-batch breaks.
    """
    from diffmoe.diffusion.flow import FlowMatching
    from diffmoe.training import step as making
    from diffmoe.training.telemetry import Telemetry

    step, seen = [1], [0]
    show, loss, create = Telemetry.step, FlowMatching.loss, making.create_engine

    def next_step(telemetry, *values):
        step[0], seen[0] = step[0] + 1, 0
        show(telemetry, *values)

    def note(telemetry, message):
        if telemetry.active:
            with open(telemetry.path.with_name("told"), "a") as file:
                file.write(message + "\n")

    def infinite_loss(objective, *values):
        seen[0] += 1
        add = math.inf if rank == 1 and step[0] == 4 and seen[0] == 1 else 0
        return {name: part + add for name, part in loss(objective, *values).items()}

    def hooked_engine(network, **values):
        expert = next(iter(network.expert_parameters().values()))
        for parameter, when in ((network.final.weight, 2), (expert, 3)):
            parameter.register_hook(
                lambda grad, when=when: (
                    grad * math.nan if rank == 1 and step[0] == when and seen[0] == 1 else grad
                )
            )
        return create(network, **values)

    Telemetry.step, Telemetry.say = next_step, note
    FlowMatching.loss, making.create_engine = infinite_loss, hooked_engine


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["micro_batch", "global"])
def test_ten_bad_steps_in_a_row_stop_the_run(tmp_path: Path, pool: str):
    """A learning rate far too large: weights overflow, every forward after that gives NaN."""
    pack(tmp_path / "data")
    config = run_config(
        tmp_path,
        50,
        optimizer__learning_rate=1e38,
        parallel__expert_parallel=2,
        moe__token_pool=pool,
    )
    with pytest.raises(AssertionError) as failure:
        train(config, world=2)
    message = str(failure.value).strip().splitlines()[-1]
    assert message.startswith("diffmoe.errors.UserError: 10 steps in a row had no finite loss")
    for part in ("optimizer.learning_rate=1e+38", "metrics.jsonl", "gradient_clipping", "resume"):
        assert part in message
    assert [line["skipped_steps"] for line in metrics(config)][-1] == PATIENCE - 1


def test_weights_that_are_not_finite_are_a_failure_and_no_checkpoint(tmp_path: Path):
    """The last step's gradient is finite, its update is not; no later step could tell."""
    pack(tmp_path / "data")
    config = run_config(tmp_path, 1, optimizer__learning_rate=1e38, optimizer__weight_decay=100.0)
    with pytest.raises(AssertionError, match="UserError: weights or averages are not finite after"):
        train(config)
    assert not list(Path(config.output).glob("*step-*"))


def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path: Path):
    """As an older version may have left it; also where nothing is left to train."""
    pack(tmp_path / "data")
    config = run_config(tmp_path, 1, optimizer__learning_rate=1e38, optimizer__weight_decay=100.0)
    assert train(config, prepare=never_look) == [True]
    with pytest.raises(AssertionError, match="step-00000001 holds weights or averages that are"):
        train(config)


def never_look(rank: int) -> None:
    from diffmoe.training import async_save

    async_save.all_finite = lambda *_: True
