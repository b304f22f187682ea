"""Averages of the weights: their profiles in closed form, over ranks, reconstructed afterwards."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe.checkpoints.profiles import (
    LONGEST,
    Profile,
    constant_keep,
    exponent,
    power_keep,
    reconstruct,
)
from diffmoe.errors import UserError
from tests.helpers.runs import (
    SignalDuringStep,
    assert_identical,
    clock,
    newest,
    pack,
    run_config,
    tensors,
    train,
)
from tests.helpers.tiny import refusal

EDM2 = (0.05, 0.10)


def constant_profile(decay: float, steps: int) -> np.ndarray:
    """How much each step's weights count, first step first."""
    counts = decay ** np.arange(steps - 1, -1, -1.0)
    return counts / counts.sum()


def power_profile(std: float, steps: int) -> np.ndarray:
    """The integral of (gamma + 1) t^gamma / n^(gamma + 1) over (k - 1, k]."""
    return np.diff((np.arange(steps + 1) / steps) ** (exponent(std) + 1))


def tracked(std: float, values: np.ndarray) -> np.ndarray:
    """The power-function average after every step, as training moves it."""
    averages, average = [], np.nan
    for step, value in enumerate(values, start=1):
        keep = power_keep(std, step)
        average = value if step == 1 else keep * average + (1 - keep) * value
        averages.append(average)
    return np.array(averages)


# Numbers -------------------------------------------------------------------------------------


def test_exponents_are_those_that_the_paper_prints():
    """EDM2, section 3.1: lengths 0.05 and 0.10 are the exponents 16.97 and 6.94."""
    assert [exponent(std) for std in EDM2] == pytest.approx([16.97, 6.94], abs=5e-3)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.25])
def test_a_length_is_the_profiles_standard_deviation(std: float):
    steps = 100_000
    times, counts = (np.arange(steps) + 0.5) / steps, power_profile(std, steps)
    mean = times @ counts
    assert np.sqrt((times - mean) ** 2 @ counts) == pytest.approx(std, rel=1e-6)
    # The definition, in the exponent's own terms (Eq. 123).
    gamma = exponent(std)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-9)


@pytest.mark.parametrize("std", [0.0, -0.1, LONGEST, 0.5])
def test_a_length_without_a_profile_is_refused(std: float):
    with pytest.raises(
        UserError, match=rf"std={std}: a relative length lies between 0 and 0\.2887"
    ):
        exponent(std)


def test_the_averages_of_a_scalar_sequence_have_their_closed_forms():
    values = np.random.default_rng(0).standard_normal(50).cumsum()
    assert constant_keep(0.9, 1) == power_keep(0.1, 1) == 0  # nothing of the initial weights
    assert constant_keep(0.9, 1000) == pytest.approx(0.9, rel=1e-12)
    average = np.nan
    for step, value in enumerate(values, start=1):
        keep = constant_keep(0.9, step)
        average = value if step == 1 else keep * average + (1 - keep) * value
        assert average == pytest.approx(constant_profile(0.9, step) @ values[:step], rel=1e-12)
        for std in EDM2:
            expected = power_profile(std, step) @ values[:step]
            assert tracked(std, values)[step - 1] == pytest.approx(expected, rel=1e-12)


def test_a_decay_near_one_starts_as_the_plain_mean():
    values = np.random.default_rng(0).standard_normal(20)
    average = values[0]
    for step, value in enumerate(values, start=1):
        average += (1 - constant_keep(0.999999, step)) * (value - average)
    assert average == pytest.approx(values.mean(), abs=1e-5)


@pytest.mark.parametrize(("std", "bound"), [(0.03, 1e-3), (0.075, 1e-4), (0.15, 2e-4), (0.2, 6e-4)])
def test_a_random_walks_average_is_reconstructed_from_two_lengths(std: float, bound: float):
    """500 steps, a snapshot of both lengths every 5: against the average tracked directly."""
    values = np.random.default_rng(1).standard_normal(500).cumsum()
    steps = range(5, 501, 5)
    stored = [Profile(length, step) for length in EDM2 for step in steps]
    averages = np.concatenate([tracked(length, values)[4::5] for length in EDM2])
    found = reconstruct(stored, Profile(std, 500))
    assert found.coefficients.sum() == pytest.approx(1, abs=1e-12)
    assert found.error < 20 * bound
    direct = tracked(std, values)[-1]
    assert found.coefficients @ averages == pytest.approx(direct, abs=bound * values.std())
    # Snapshots are fp32: what they round to does not blow up.
    rounded = averages.astype(np.float32).astype(np.float64)
    assert found.coefficients @ rounded == pytest.approx(direct, abs=bound * values.std() + 1e-5)


def test_the_profiles_error_is_that_of_the_combination_step_by_step():
    """The L2 distance from closed-form inner products equals that on a fine grid."""
    stored = [Profile(length, step) for length in EDM2 for step in (2000, 4000, 8000)]
    found = reconstruct(stored, Profile(0.2, 8000))
    grid = [np.pad(power_profile(p.std, p.steps), (0, 8000 - p.steps)) for p in stored]
    wanted = power_profile(0.2, 8000)
    difference = found.coefficients @ np.array(grid) - wanted
    distance = np.linalg.norm(difference) / np.linalg.norm(wanted)
    assert distance > 0.1
    assert found.error == pytest.approx(distance, rel=1e-3)
    # Least squares under the sum 1: moving along any such direction makes it worse.
    for direction in np.eye(6) - np.roll(np.eye(6), 1, axis=1):
        for size in (-1e-3, 1e-3):
            other = difference + size * direction @ np.array(grid)
            assert np.linalg.norm(other) > np.linalg.norm(difference)


def test_a_stored_average_is_found_again_and_the_future_is_refused():
    stored = [Profile(std, step) for std in EDM2 for step in (100, 200, 300)]
    found = reconstruct(stored, Profile(0.1, 200))
    np.testing.assert_allclose(found.coefficients, [0, 0, 0, 0, 1, 0], atol=1e-9)
    assert found.error < 1e-6
    with pytest.raises(UserError, match="step 301 lies beyond the newest stored average, step 300"):
        reconstruct(stored, Profile(0.1, 301))


# Training ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_averages_over_ranks_have_their_closed_forms(tmp_path: Path):
    """Every element of every tensor; on the way a stop, a resume, and a step that is skipped."""
    pack(tmp_path / "data")
    config = run_config(
        tmp_path,
        6,
        training__checkpoint_samples=8,
        training__keep_last=6,
        training__ema_stds=EDM2,
        parallel__expert_parallel=2,
    )
    train(config, world=2, prepare=SignalDuringStep(2))
    train(config, world=2, prepare=break_first_loss)
    assert clock(newest(config)) == {"samples": 48, "step": 6, "skipped": 1}
    steps = [tensors(Path(config.output) / f"step-{k:08d}") for k in range(1, 7)]
    assert_identical(steps.pop(2), steps[1])  # the skipped one
    assert {name.split("/")[0] for name in steps[0]} == {
        "weights", "exp_avg", "exp_avg_sq", "buffers", "ema", "ema-0.05", "ema-0.1"
    }  # fmt: skip
    names = [name.removeprefix("weights/") for name in steps[0] if name.startswith("weights/")]
    for n, state in enumerate(steps, start=1):
        profiles = {"ema": constant_profile(0.8, n)}
        profiles |= {f"ema-{std}": power_profile(std, n) for std in EDM2}
        for prefix, profile in profiles.items():
            for name in names:
                weights = torch.stack([past[f"weights/{name}"].double() for past in steps[:n]])
                expected = torch.from_numpy(profile) @ weights
                # fp32, at most five times, on numbers up to 1
                torch.testing.assert_close(
                    state[f"{prefix}/{name}"].double(), expected, atol=3e-7, rtol=0
                )
    moved = [
        name for name in names if not torch.equal(state[f"ema/{name}"], state[f"weights/{name}"])
    ]
    assert moved == names


def break_first_loss(rank: int) -> None:
    from diffmoe.diffusion.flow import FlowMatching

    loss, factors = FlowMatching.loss, itertools.chain([math.nan], itertools.repeat(1.0))

    def broken(*values):
        factor = next(factors)
        return {name: part * factor for name, part in loss(*values).items()}

    FlowMatching.loss = broken


def test_averages_do_not_touch_the_run_and_are_absent_when_off(tmp_path: Path):
    pack(tmp_path / "data")
    off = run_config(tmp_path, 3, training__ema_decay=None)
    on = off.replace(
        {
            "output": str(tmp_path / "on"),
            "training.ema_decay": 0.9,
            "training.ema_stds": [0.1],
        }
    )
    train(off)
    train(on)
    without, with_averages = tensors(newest(off)), tensors(newest(on))
    assert {name.split("/")[0] for name in without} == {
        "weights", "exp_avg", "exp_avg_sq", "buffers"
    }  # fmt: skip
    assert_identical({name: with_averages[name] for name in without}, without)
    size, full = (
        sum(file.stat().st_size for file in newest(config).glob("*.distcp")) for config in (off, on)
    )
    assert size == pytest.approx(full * 3 / 5, rel=0.02)


def test_a_length_twice_or_out_of_range_is_refused():
    assert "training.ema_stds=[0.1, 0.1] lists a length twice" in refusal(
        "training.ema_stds=[0.1, 0.1]"
    )
    assert "training.ema_stds.1=0.3: Input should be less than 0.288" in refusal(
        "training.ema_stds=[0.1, 0.3]"
    )
