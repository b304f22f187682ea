"""Commands in processes of their own, as users start them; free ports; kills at a chosen call."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffmoe.config import Config

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


def wait_for_metrics(config: Config, seconds: float = 120) -> None:
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


def free_port() -> int:
    """Below those that the kernel gives to outgoing connections, which could take it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def killed(work: Callable[[], Any], module: Any, name: str, at: int) -> bool:
    """Do `work` in a process that kills itself at the `at`-th call of a module's function."""
    process = os.fork()
    if process == 0:
        original, calls = getattr(module, name), [0]

        def deadly(*arguments, **options):
            calls[0] += 1
            if calls[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(module, name, deadly)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
