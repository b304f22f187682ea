"""What is checked before a job is queued."""

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
from diffmoe.planning.memory import MASTER, average_count, dense_groups, expert_groups
from diffmoe.training import preflight
from diffmoe.training.resume import check_configuration


def check_submission(
    config: Config, ds_config: str | None, nodes: int, gpus_per_node: int, machine: Machine
) -> Plan:
    """Check everything that can be checked without a GPU, and plan the run. Writes nothing.

    ds_config: path of the DeepSpeed JSON; its offload, buckets and stage count in the plan. Raises
    UserError where the run itself would at its start, and if it does not fit the memory of the
    GPUs or the nodes, or the disk.
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
            f"{planned.layout.describe()} needs {planned.memory.total / 1e9:.1f} GB per GPU, and "
            f"--gpu-memory is {machine.memory / 1e9:g}; tools/plan.py shows what fits"
        )
    if not planned.fits_node:
        raise UserError(
            f"{planned.layout.describe()} needs {planned.host.total / 1e9:.1f} GB of host memory "
            f"per node, and the job requests {machine.node_memory / 1e9:.1f} (--mem); "
            f"request {-(-planned.host.total // 2**30)}G, or see tools/plan.py"
        )
    check_space(planned.layout)
    return planned


def checkpoint_bytes(layout: Layout) -> int:
    """Size of one checkpoint: masters, moments and the averages of every parameter."""
    groups = [
        *dense_groups(layout),
        *(group for group in expert_groups(layout) for _ in range(layout.expert_parallel)),
    ]
    kept = 1 + average_count(layout)
    sizes = layout.sizes
    frozen = sizes.frozen + sizes.frozen_experts * (layout.expert_parallel - 1)
    trained = sum(group.elements * (kept + group.moments) for group in groups)
    return (trained + frozen * kept) * MASTER


def check_space(layout: Layout) -> None:
    """Raise UserError without disk space for the checkpoints still to come, plus one.

    The run keeps training.keep_last checkpoints, and writes the next before it deletes the oldest.
    """
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
            f"output={config.output}: {free / 1e9:.1f} GB are free there, and checkpoints need "
            f"{wanted / 1e9:.1f} (training.keep_last={keeps}, {one / 1e9:.1f} GB each); choose "
            "another output, or lower training.keep_last"
        )
