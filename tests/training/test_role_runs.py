"""Runs with rates and weight decay by role: what they go on with, on which layout."""

import json
from pathlib import Path

import pytest

from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.training import preflight
from diffmoe.training.resume import check_configuration, find_checkpoint
from tests.helpers.runs import (
    HALF,
    assert_identical,
    half_of,
    metrics,
    newest,
    pack,
    run_config,
    tensors,
    train,
)
from tests.helpers.tiny import refusal


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Config:
    """Six steps of two ranks that share the experts, saved after three and six."""
    folder = tmp_path_factory.mktemp("roles")
    pack(folder / "data")
    config = run_config(
        folder,
        6,
        training__checkpoint_samples=24,
        model__depth=2,
        moe__token_pool="global",
        optimizer__eps=1e-3,  # far above the gradients' rounding
        optimizer__weight_decay=0.1,
        optimizer__rate_multipliers={"router": 0.1, "experts": 2.0},
        optimizer__warmup_samples=16,
        parallel__expert_parallel=2,
    )
    assert train(config, world=2) == [True, True]
    return config


def test_metrics_show_the_rate_of_each_role_with_a_multiplier(run: Config):
    for key, peak in (
        ("learning_rate", 0.01),
        ("router_learning_rate", 0.001),
        ("experts_learning_rate", 0.02),
    ):
        found = [line[key] for line in metrics(run)]
        assert found == pytest.approx([peak * share for share in (0.5, 1, 1, 1, 1, 1)], abs=1e-12)
    assert {key for key in metrics(run)[0] if key.endswith("learning_rate")} == {
        *("learning_rate", "router_learning_rate", "experts_learning_rate")
    }


def test_resuming_equals_not_stopping_bit_for_bit(run: Config, tmp_path: Path):
    config = half_of(run, tmp_path)
    assert train(config, world=2) == [True, True]
    assert_identical(tensors(newest(config)), tensors(newest(run)))


def test_another_layout_goes_on_alike(run: Config, tmp_path: Path):
    config = half_of(run, tmp_path, parallel__expert_parallel=1, parallel__zero_stage=2)
    assert train(config) == [True]
    found, expected = tensors(newest(config)), tensors(newest(run))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 1e-5, name


def test_other_multipliers_go_on_with_the_same_moments_where_allowed(run: Config, tmp_path: Path):
    """Parameters then lie in other groups."""
    changes = {"optimizer__rate_multipliers": {"router": 1e-30, "attention": 0.5}}
    config = half_of(run, tmp_path, parallel__expert_parallel=1, **changes)
    with pytest.raises(UserError) as caught:
        find_checkpoint(config, "auto")
    fields = [f"optimizer.rate_multipliers.{role}" for role in ("attention", "experts", "router")]
    expected = ("1.0 there, 0.5", "2.0 there, 1.0", "0.1 there, 1e-30")
    for field, line in zip(fields, expected, strict=True):
        assert f"  {field}: {line} now" in str(caught.value)
        assert f"--allow-changed {field}" in str(caught.value)
    assert train(config, allow_changed=fields) == [True]
    state, half = tensors(newest(config)), tensors(Path(config.output) / HALF)
    router, beta = "blocks.1.feed_forward.router", config.optimizer.betas[1]
    assert (state[f"weights/{router}"] - half[f"weights/{router}"]).abs().max() < 1e-9
    # Three steps later there is still this much of the second moment at least.
    kept = half[f"exp_avg_sq/{router}"] * beta**3
    assert kept.max() > 0
    assert (state[f"exp_avg_sq/{router}"] >= kept * (1 - 1e-6)).all()


def test_a_run_whose_weight_decay_was_of_all_parameters_is_told(run: Config, tmp_path: Path):
    """As versions did that had no multipliers."""
    config = half_of(run, tmp_path, optimizer__rate_multipliers={})
    checkpoint = Path(config.output) / HALF
    file = checkpoint / "run.json"
    record = json.loads(file.read_text())
    del record["config"]["optimizer"]["rate_multipliers"]
    file.write_text(json.dumps(record))
    line = "optimizer.weight_decay: 0.1 of all parameters there, 0.1 of matrices alone now"
    with pytest.raises(UserError, match=line):
        check_configuration(checkpoint, config, [])
    notes = check_configuration(checkpoint, config, ["optimizer.weight_decay"])
    assert f"changed since {HALF}: {line}" in notes
    without = config.replace({"optimizer.weight_decay": 0.0})
    with pytest.raises(UserError, match=r"optimizer\.weight_decay: 0\.1 there, 0\.0 now"):
        check_configuration(checkpoint, without, [])


def test_roles_that_cannot_be_meant_are_refused(tmp_path: Path):
    text = refusal("optimizer.rate_multipliers={routers: 0.1}")
    assert "unknown key optimizer.rate_multipliers.routers=0.1" in text
    assert "Did you mean optimizer.rate_multipliers.router?" in text
    assert "known: embedding, text, attention, mlp, experts, router, predictor" in text
    assert "greater than 0" in refusal("optimizer.rate_multipliers.router=0")
    pack(tmp_path / "data")
    for changes, message in (
        ({"projector": 0.1}, "rate_multipliers.projector=0.1: the network has no such parameters"),
        ({"text": 2.0}, "its roles are embedding, attention, mlp, modulation, router, experts"),
    ):
        config = run_config(tmp_path, 1, optimizer__rate_multipliers=changes)
        with pytest.raises(UserError) as caught:
            preflight.check(config, {}, 1)
        assert message in str(caught.value)
