"""Runs with Muon: what they save, and what they go on with."""

import multiprocessing
from pathlib import Path

import pytest

from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.planning.layouts import Layout
from diffmoe.planning.submission import checkpoint_bytes
from diffmoe.training.resume import find_checkpoint
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import (
    HALF,
    assert_identical,
    clock,
    half_of,
    metrics,
    newest,
    pack,
    run_config,
    tensors,
    train,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Config:
    """Six steps of two ranks that share the experts, saved after three and six."""
    folder = tmp_path_factory.mktemp("muon")
    pack(folder / "data")
    config = run_config(
        folder,
        6,
        training__checkpoint_samples=24,
        moe__token_pool="global",
        model__width=20,  # these three: partitions' ends cut matrices
        model__depth=2,
        moe__shared_expert_ratio=1.0,
        optimizer__type="muon",
        optimizer__eps=1e-3,  # far above the gradients' rounding
        optimizer__weight_decay=0.01,
        optimizer__muon__learning_rate=0.02,
        optimizer__muon__weight_decay=0.1,
        optimizer__gradient_clipping=0.5,
        optimizer__schedule="warmup_stable_decay",
        optimizer__warmup_samples=16,
        optimizer__decay_samples=16,
        parallel__expert_parallel=2,
    )
    assert train(config, world=2) == [True, True]
    return config


def test_a_checkpoint_holds_one_momentum_in_place_of_two_moments(run: Config):
    state = tensors(newest(run))
    kinds: dict[str, set[str]] = {}
    for name in state:
        kind, _, parameter = name.partition("/")
        kinds.setdefault(kind, set()).add(parameter)
    assert set(kinds) == {"weights", "exp_avg", "exp_avg_sq", "momentum", "ema", "buffers"}
    assert kinds["exp_avg"] == kinds["exp_avg_sq"]
    assert kinds["exp_avg"] | kinds["momentum"] == kinds["weights"] == kinds["ema"]
    assert kinds["exp_avg"].isdisjoint(kinds["momentum"])
    for name in ("blocks.1.feed_forward.experts.w_in", "blocks.0.attention.qkv.weight"):
        assert state[f"momentum/{name}"].numel() == state[f"weights/{name}"].numel()
        assert state[f"momentum/{name}"].count_nonzero()
    held = sum(4 * one.numel() for name, one in state.items() if not name.startswith("buffers/"))
    assert held == checkpoint_bytes(Layout(run, 1, 2))
    adamw = run.replace({"optimizer": {"type": "adamw"}})
    saved = checkpoint_bytes(Layout(adamw, 1, 2)) - held
    assert saved == 4 * sum(state[f"momentum/{name}"].numel() for name in kinds["momentum"])


def test_both_rates_follow_the_schedule(run: Config):
    shares = [0.5, 1, 1, 1, 1 - 0.5**0.5, 0]
    for key, peak in (("learning_rate", 0.01), ("muon_learning_rate", 0.02)):
        found = [line[key] for line in metrics(run)]
        assert found == pytest.approx([peak * share for share in shares], abs=1e-12)


def test_resuming_equals_not_stopping_bit_for_bit(run: Config, tmp_path: Path):
    config = half_of(run, tmp_path)
    assert train(config, world=2) == [True, True]
    assert_identical(tensors(newest(config)), tensors(newest(run)))


@pytest.mark.parametrize(
    ("world", "ranks", "stage"), [(1, 1, 2), pytest.param(4, 2, 1, marks=pytest.mark.slow)]
)
def test_another_layout_goes_on_alike(
    run: Config, tmp_path: Path, world: int, ranks: int, stage: int
):
    config = half_of(run, tmp_path, parallel__expert_parallel=ranks, parallel__zero_stage=stage)
    assert train(config, world) == [True] * world
    found, expected = tensors(newest(config)), tensors(newest(run))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # Newton-Schulz amplifies the rounding of sums in another order.
        assert (found[name] - tensor).abs().max() < 1e-5, name


def test_a_stable_phase_may_end_elsewhere(run: Config, tmp_path: Path):
    """At step 3 the rate has not begun to fall: the end may move, but not before this clock."""
    later = half_of(run, tmp_path, training__total_samples=80, optimizer__decay_samples=40)
    notes = find_checkpoint(later, "auto").notes
    assert notes[:2] == [
        f"changed since {HALF}: optimizer.decay_samples: 16 there, 40 now",
        f"changed since {HALF}: training.total_samples: 48 there, 80 now",
    ]
    constant = later.replace({"optimizer.schedule": "constant", "optimizer.decay_samples": 0})
    assert len(find_checkpoint(constant, "auto").notes) >= 3
    earlier = later.replace({"training.total_samples": 56})
    with pytest.raises(UserError, match=r"optimizer.decay_samples: 16 there, 40 now"):
        find_checkpoint(earlier, "auto")


def test_another_optimizer_is_refused_unless_allowed(run: Config, tmp_path: Path):
    config = half_of(run, tmp_path, parallel__expert_parallel=1)
    config = config.replace({"optimizer.type": "adamw", "optimizer.muon": {}})
    with pytest.raises(UserError) as caught:
        find_checkpoint(config, "auto")
    assert "  optimizer.type: muon there, adamw now" in str(caught.value)
    said = run_ranks(1, go_on, config, connect=False)[0]
    assert any("optimizer.type: muon there" in line and "starts anew" in line for line in said)
    assert any("the state of muon stays behind, adamw's starts at 0" in line for line in said)
    assert any("restored ema, weights of" in line for line in said)
    state = tensors(newest(config))
    assert not [name for name in state if name.startswith("momentum/")]
    assert state["exp_avg_sq/blocks.1.feed_forward.experts.w_in"].count_nonzero()
    record = (newest(config) / "run.json").read_text()
    assert '"optimizer_steps": 3' in record
    assert clock(newest(config))["step"] == 6
    assert state["weights/final.weight"].isfinite().all()
    before = tensors(Path(config.output) / HALF)["weights/final.weight"]
    moved = (state["weights/final.weight"] - before).abs().max()
    assert 0 < moved < 3 * 0.01 * 1.5  # three steps from those weights


def go_on(config: Config) -> list[str]:
    """Resume although the optimizer changes; all that was said."""
    from diffmoe.training.start import start
    from diffmoe.training.telemetry import Telemetry

    multiprocessing.set_start_method("fork", force=True)
    said: list[str] = []
    Telemetry.say = lambda telemetry, message: said.append(message)
    fields = ["optimizer.type", *(f"optimizer.muon.{n}" for n in ("learning_rate", "weight_decay"))]
    said += find_checkpoint(config, "auto", fields).notes
    assert start(config, None, "auto", "cpu", allow_changed=fields)
    return said
