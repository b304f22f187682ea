"""Checks before a job is queued."""

import os
import shutil
from pathlib import Path

from diffmoe.checkpoints import folder
from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.parallel.zero import read_ds_config, reconcile
from diffmoe.planning.estimate import Plan, plan
from diffmoe.planning.layouts import Layout, Zero
from diffmoe.planning.machine import Machine
from diffmoe.planning.memory import MASTER, averages
from diffmoe.training import preflight
from diffmoe.training.resume import check_configuration


def check(
    config: Config, ds_config: str | None, nodes: int, gpus_per_node: int, machine: Machine
) -> Plan:
    """All that can be refused before the queue; writes nothing, and needs no GPU.

    Raises UserError as the run itself would, or because it won't fit the GPUs, the nodes' memory
    or the disk.
    """
    given = read_ds_config(ds_config) if ds_config else {}
    config = reconcile(config, given, ds_config or "")
    preflight.check(config, given, nodes * gpus_per_node)
    output = Path(config.output)
    if folder.names(output):
        check_configuration(folder.find_complete(output), config, [])
    planned = plan(Layout(config, nodes, gpus_per_node, Zero.of(given)), machine)
    if not planned.fits_gpu:
        raise UserError(
            f"{planned.layout.describe()} needs {planned.memory.total / 1e9:.1f} GB a GPU, and "
            f"--gpu-memory is {machine.memory / 1e9:g}; tools/plan.py shows what fits"
        )
    if not planned.fits_node:
        raise UserError(
            f"{planned.layout.describe()} needs {planned.host.total / 1e9:.1f} GB of host memory a "
            f"node, and the job asks for {machine.node_memory / 1e9:.1f} (--mem); "
            f"give {-(-planned.host.total // 2**30)}G, or see tools/plan.py"
        )
    check_space(planned.layout)
    return planned


def checkpoint_bytes(layout: Layout) -> int:
    """One whole checkpoint: masters, two moments and the averages of every parameter."""
    sizes = layout.sizes
    elements = sizes.dense + sizes.experts * layout.expert_parallel
    return elements * MASTER * (3 + averages(layout))


def check_space(layout: Layout) -> None:
    """Room for the checkpoints that the run keeps and does not have yet, and for one more."""
    config = layout.config
    place = Path(config.output).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"output={config.output}: {place} cannot be written; choose another output")
    one, keeps = checkpoint_bytes(layout), config.training.keep_last
    wanted = one * max(1, keeps + 1 - len(folder.names(Path(config.output))))
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise UserError(
            f"output={config.output}: {free / 1e9:.1f} GB are free there, and the checkpoints need "
            f"{wanted / 1e9:.1f} (training.keep_last={keeps}, {one / 1e9:.1f} GB each); choose "
            "another output, or set training.keep_last lower"
        )
