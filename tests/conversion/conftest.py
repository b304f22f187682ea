"""Runs on real ranks, made once."""

from pathlib import Path

import pytest

from diffmoe.config import Config
from tests.training.runs import pack, run_config, train


def _run(folder: Path, world: int, **changes) -> Config:
    pack(folder / "data", class_names=["plane", "car", "bird", "cat", "deer"])
    config = run_config(
        folder, 3, training__ema_stds=[0.05, 0.1], logging__log_samples=24, **changes
    )
    train(config, world)
    return config


@pytest.fixture(scope="session")
def spread_run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two ranks that share the experts, ZeRO stage 2."""
    folder = tmp_path_factory.mktemp("spread")
    return _run(folder, 2, parallel__expert_parallel=2, parallel__zero_stage=2)


@pytest.fixture(scope="session")
def single_run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """One rank, stage 1."""
    return _run(tmp_path_factory.mktemp("single"), 1)
