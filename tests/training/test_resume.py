"""A run that was stopped and resumed equals the run that was not."""

from pathlib import Path

import pytest

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

EVERYTHING = {
    "training__accumulation": 2,
    "training__precision": "bf16",
    "training__label_dropout": 0.5,
    "training__activation_checkpointing": True,
    "data__workers": 1,
    "optimizer__gradient_clipping": 0.5,
    "optimizer__weight_decay": 0.01,
    "optimizer__schedule": "cosine",
    "optimizer__warmup_samples": 16,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "changes", "counts", "stops"),
    [
        (2, {"parallel__zero_stage": 2}, None, (2, 4)),
        (1, EVERYTHING, None, (2, 4)),
        (2, EVERYTHING, None, (2, 4)),
        (2, {**EVERYTHING, "parallel__zero_stage": 2}, None, (2, 4)),
        (2, {**EVERYTHING, "optimizer__type": "muon", "parallel__zero_stage": 2}, None, (2, 4)),
        # Lanes of 8 samples, 2 a step: an epoch is 4 steps.
        (2, EVERYTHING, [8] * 4, (4, 5)),
    ],
    ids=[
        "two ranks, stage 2",
        "one rank, everything",
        "two ranks, everything",
        "two ranks, everything, stage 2",
        "two ranks, everything, stage 2, Muon",
        "at an epoch's end and a step later",
    ],
)
def test_resuming_twice_equals_not_stopping(
    tmp_path: Path, world: int, changes: dict, counts: list[int] | None, stops: tuple[int, int]
):
    """Weights, moments, averages, thresholds and clock, bit for bit; in the middle of epochs."""
    pack(tmp_path / "data", counts)
    whole = run_config(tmp_path, 6, parallel__expert_parallel=world, **changes)
    parts = whole.replace({"output": str(tmp_path / "parts")})
    assert train(whole, world) == [True] * world
    for step in stops:
        assert train(parts, world, prepare=SignalDuringStep(step)) == [False] * world
        assert clock(newest(parts)) == {"samples": 8 * step, "step": step, "skipped": 0}
    assert train(parts, world) == [True] * world
    assert clock(newest(parts)) == clock(newest(whole))
    assert clock(newest(whole)) == {"samples": 48, "step": 6, "skipped": 0}
    state = tensors(newest(whole))
    assert_identical(tensors(newest(parts)), state)
    kinds = {name.split("/")[0] for name in state}
    assert kinds - {"momentum"} == {"weights", "exp_avg", "exp_avg_sq", "ema", "buffers"}
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_that_accumulate_in_bf16_resume_as_well(tmp_path: Path, stage: int):
    pack(tmp_path / "data")
    ds_config = tmp_path / "ds.json"
    ds_config.write_text('{"data_types": {"grad_accum_dtype": "bf16"}}')
    changes = {**EVERYTHING, "parallel__zero_stage": stage, "parallel__expert_parallel": 2}
    whole = run_config(tmp_path, 4, **changes)
    parts = whole.replace({"output": str(tmp_path / "parts")})
    assert train(whole, 2, ds_config=str(ds_config)) == [True] * 2
    stopping = SignalDuringStep(2)
    assert train(parts, 2, prepare=stopping, ds_config=str(ds_config)) == [False] * 2
    assert train(parts, 2, ds_config=str(ds_config)) == [True] * 2
    assert_identical(tensors(newest(parts)), tensors(newest(whole)))
