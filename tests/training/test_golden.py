"""Losses of two tiny runs, as numbers: a refactoring that changes any of them shows here."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import metrics, pack, run_config, train

# Of flow matching with the experts on two ranks, and of DDPM with learned variances in bf16.
GOLDEN: dict[str, tuple[int, dict[str, Any], list[float]]] = {
    "flow": (
        2,
        {"parallel__expert_parallel": 2},
        [1.9524020552635193, 2.1129871606826782, 1.9228893518447876, 2.0291802287101746],
    ),
    "ddpm": (
        1,
        {
            "diffusion__objective": "ddpm",
            "model__learn_sigma": True,
            "training__precision": "bf16",
        },
        [0.996640145778656, 0.9172141551971436, 0.8682779669761658, 0.8487895131111145],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_losses_are_those_of_before(tmp_path: Path, name: str):
    world, changes, expected = GOLDEN[name]
    pack(tmp_path / "data")
    config = run_config(tmp_path, 4, **changes)
    train(config, world)
    # Processors round differently, in bf16 more so.
    tolerance = 1e-5 if name == "flow" else 2e-3
    assert [line["loss"] for line in metrics(config)] == pytest.approx(expected, rel=tolerance)
