"""Runs begun from Python: one after the other in a process, with or without a launcher."""

import os
import signal
from pathlib import Path

import pytest

import diffmoe
from diffmoe.config import Config
from diffmoe.errors import UserError
from tests.helpers.processes import write_config
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import assert_identical, metrics, newest, pack, run_config, tensors
from tests.helpers.tools import forked


def trained(configs: list[Config], alone: bool) -> list[bool]:
    if alone:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    before = signal.getsignal(signal.SIGTERM)
    finished = [diffmoe.train(config, device="cpu") for config in configs]
    if alone:
        with pytest.raises(UserError, match="nowhere does not exist"):
            diffmoe.train(configs[0].replace({"data.path": "nowhere"}), device="cpu")
        finished.append(diffmoe.train(configs[-1], device="cpu"))
        assert "RANK" not in os.environ
    assert signal.getsignal(signal.SIGTERM) == before
    return finished


@pytest.mark.parametrize("world", [1, 2])
def test_runs_follow_each_other_in_a_process(world: int, tmp_path: Path):
    pack(tmp_path / "data")
    configs = [
        run_config(tmp_path, 2, output=str(tmp_path / name), parallel__expert_parallel=world)
        for name in ("first", "second")
    ]
    alone = world == 1
    done = run_ranks(world, trained, configs, alone, connect=False)
    assert done == [[True, True] + [True] * alone] * world
    assert_identical(tensors(newest(configs[1])), tensors(newest(configs[0])))


@pytest.mark.slow
def test_a_run_says_what_it_is_and_what_comes_next(tmp_path: Path):
    pack(tmp_path / "data", class_names=["plane", "car", "night sky", "deer", "ship"])
    config = run_config(tmp_path, 2)
    words = "train.py", "--config", write_config(config), "--device", "cpu"
    told = forked(*words).stderr
    assert "1 rank on cpu, fp32; 0.04 million parameters, of which 0.03 million work on an" in told
    assert f"36 samples of {config.data.path}; output {config.output}\n" in told
    following = f"next: python tools/sample.py {config.output} --classes 'plane,car,night sky' "
    assert following in told
    assert "nothing to do" not in told
    told = forked(*words).stderr
    assert f"{config.output} has already been trained on 16 samples: nothing to do" in told
    assert following in told
    assert len(metrics(config)) == 2
