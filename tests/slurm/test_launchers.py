"""Several nodes without Slurm, pretended on loopback: torchrun, and DeepSpeed's hostfile."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, TRAIN, environment, write_config
from tests.helpers.ports import free_port
from tests.helpers.runs import metrics, newest, pack, run_config

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent


def launcher(name: str, node: int, port: str, folder: Path) -> list[str]:
    if name == "torchrun":
        where = ["--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1"]
        return [str(BIN / "torchrun"), *where, "--master_addr", "127.0.0.1", "--master_port", port]
    hosts = folder / "hostfile"
    hosts.write_text("n1 slots=1\nn2 slots=1\n")
    where = ["--hostfile", str(hosts), "--no_ssh", "--node_rank", str(node)]
    return [str(BIN / "deepspeed"), *where, "--master_addr", "127.0.0.1", "--master_port", port]


@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_two_nodes_share_the_experts(name: str, tmp_path: Path):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 3, parallel__expert_parallel=2)
    port = str(free_port())
    path = write_config(config)
    nodes = [
        subprocess.Popen(
            [*launcher(name, node, port, tmp_path), TRAIN, "--config", path, "--device", "cpu"],
            env=environment(GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu"),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    try:
        told = [node.communicate(timeout=90)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], told
    assert newest(config).name == "step-00000003"
    assert [line["step"] for line in metrics(config)] == [1, 2, 3]
