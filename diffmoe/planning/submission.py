"""Checks before a job is queued, and its script."""

import re
import shlex
import shutil
from pathlib import Path

from diffmoe.checkpoints import folder
from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.parallel.zero import engine_settings, read_ds_config, reconcile
from diffmoe.planning.estimate import Plan, plan
from diffmoe.planning.layouts import Layout
from diffmoe.planning.machine import Machine
from diffmoe.planning.memory import MASTER, averages
from diffmoe.training import initial
from diffmoe.training.resume import check_configuration
from diffmoe.training.start import check_data


def check(
    config: Config, ds_config: str | None, nodes: int, gpus_per_node: int, machine: Machine
) -> Plan:
    """All that can be refused before the queue; writes nothing, and needs no GPU.

    Raises UserError as the run itself would, or because it won't fit the GPUs or the disk.
    """
    given = read_ds_config(ds_config) if ds_config else {}
    config = reconcile(config, given, ds_config or "")
    world = nodes * gpus_per_node
    config.check_world(world)
    engine_settings(config, given, world)
    check_data(config)
    initial.check(config)
    output = Path(config.output)
    there = folder.names(output)
    if there:
        check_configuration(output / there[-1], config, [])
    planned = plan(Layout(config, nodes, gpus_per_node), machine)
    if not planned.fits:
        raise UserError(
            f"{planned.layout.describe()} needs {planned.memory.total / 1e9:.1f} GB a GPU, and "
            f"--gpu-memory is {machine.memory / 1e9:g}; tools/plan.py shows what fits"
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
    one, keeps = checkpoint_bytes(layout), config.training.keep_last
    wanted = one * max(1, keeps + 1 - len(folder.names(Path(config.output))))
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise UserError(
            f"output={config.output}: {free / 1e9:.1f} GB are free there, and the checkpoints need "
            f"{wanted / 1e9:.1f} (training.keep_last={keeps}, {one / 1e9:.1f} GB each); choose "
            "another output, or set training.keep_last lower"
        )


def script(
    template: str, resources: dict[str, str], environment: dict[str, str], arguments: list[str]
) -> str:
    """A template of slurm/ with all that was chosen written into it.

    resources: sbatch options without dashes. arguments: the recipe, then train.py's.
    """
    lines, missing = [], dict(resources)
    for line in template.splitlines():
        option = re.match(r"#SBATCH --([a-z-]+)=", line)
        if option and option[1] in missing:
            line = f"#SBATCH --{option[1]}={missing.pop(option[1])}"
        elif line.startswith("source "):
            lines += [f"#SBATCH --{name}={value}" for name, value in missing.items()]
            lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
        elif line.startswith("diffmoe_train "):
            settings = shlex.split(line)[2:-1]  # without the template's recipe and "$@"
            line = shlex.join(["diffmoe_train", arguments[0], *settings, *arguments[1:]])
        lines.append(line)
    return "\n".join(lines) + "\n"


def template_settings(template: str) -> list[str]:
    """The settings that a template itself gives train.py."""
    line = next(line for line in template.splitlines() if line.startswith("diffmoe_train "))
    return shlex.split(line)[2:-1]
