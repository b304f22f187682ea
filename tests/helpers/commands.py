"""train.py as its users start it: in processes of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

from diffmoe.config import Config
from tests.helpers.ports import free_port

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "train.py")


def environment(**more: str) -> dict[str, str]:
    """This process's, without what a launcher or an earlier test put there."""
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "WANDB_MODE")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def command(*arguments: str, timeout: float = 90) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, env=environment(), capture_output=True, text=True, timeout=timeout, cwd=ROOT
    )


def write_config(config: Config) -> str:
    path = Path(config.output).with_suffix(".yaml")
    path.write_text(config.to_yaml())
    return str(path)


def wait_for_metrics(config: Config, seconds: float = 60) -> None:
    path = Path(config.output) / "metrics.jsonl"
    deadline = time.monotonic() + seconds
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"no metrics after {seconds} s"
        time.sleep(0.1)


BIN = Path(sys.executable).parent


TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", TRAIN]


def deepspeed() -> list[str]:
    port = str(free_port())
    return [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", port, TRAIN]
