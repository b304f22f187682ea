"""From the command line to the loop: process group, checks, output folder, resume."""

from contextlib import closing
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from diffmoe.config import Config
from diffmoe.parallel.device import setup_device, use_deterministic_algorithms
from diffmoe.parallel.topology import create_topology, destroy_topology
from diffmoe.parallel.zero import read_ds_config, reconcile
from diffmoe.training import agreement, init_from, preflight, watchdog
from diffmoe.training.lease import hold
from diffmoe.training.loop import train
from diffmoe.training.resume import find_checkpoint, make_way
from diffmoe.training.signals import StopRequest
from diffmoe.training.telemetry import Telemetry


def start(
    config: Config,
    ds_config: str | None = None,
    resume: str = "auto",
    device: str | None = None,
    print_only: bool = False,
    allow_changed: list[str] | None = None,
) -> bool:
    """Check everything, then train. Returns False if the run was asked to stop before its end.

    Without a launcher in one process, as often as you like; of torchrun's ranks each calls it.
    ds_config: a DeepSpeed JSON. resume: auto, none, or a path. device: cpu or cuda; default: cuda
    where there is one. print_only: show the settings instead. allow_changed: settings in which a
    resumed run may differ from its checkpoint. Raises UserError before any work starts.

    The data folder holds latents (C, H, W) of the shape that the model takes.

    >>> import diffmoe
    >>> short = ["training.total_samples=16", "training.batch_size=8", "model.depth=2"]
    >>> config = diffmoe.load_config("mnist", [*short, "output=runs/short", "logging.wandb=false"])
    >>> diffmoe.train(config, device="cpu")
    True
    >>> diffmoe.load(config.output).config.depth  # of its newest checkpoint
    2
    """
    if print_only:
        print(_reconciled(config, ds_config)[0].explained(), end="")
        return True
    try:
        # Before the checks: what machines find may differ, and joined ranks tell a failure once.
        chosen = _connect(device, config.parallel.timeout_seconds)
        return _run(*_reconciled(config, ds_config), chosen, resume, allow_changed)
    except BaseException:
        watchdog.part_alone()
        raise


def _reconciled(config: Config, ds_config: str | None) -> tuple[Config, dict[str, Any]]:
    """The configuration, and the DeepSpeed JSON that it has been held against."""
    settings = read_ds_config(ds_config) if ds_config else {}
    return reconcile(config, settings, ds_config or ""), settings


def _run(
    config: Config,
    settings: dict[str, Any],
    chosen: torch.device,
    resume: str,
    allow_changed: list[str] | None,
) -> bool:
    if config.training.deterministic:
        use_deterministic_algorithms()
    options = {
        "--resume": resume,
        "--allow-changed": sorted(allow_changed or []),
        "--device": chosen.type,
    }
    agreement.check_settings(config, settings, options)
    agreement.check_folders(config, resume)
    preflight.check(config, settings, dist.get_world_size())
    with hold(Path(config.output)) as lease, closing(StopRequest()) as stop:
        going_on = find_checkpoint(config, resume, allow_changed)
        config = init_from.with_rope_grid(config, going_on.checkpoint)
        topology = create_topology(config.parallel.expert_parallel)
        dist.barrier()  # every rank has looked at the output before the first one writes there
        if topology.rank == 0:
            make_way(config, going_on)
        telemetry = Telemetry(config, active=topology.rank == 0)
        finished = train(config, topology, chosen, settings, going_on, stop, lease, telemetry)
        destroy_topology()
        watchdog.part()
        telemetry.finish()  # no rank waits for it, and the exit code is decided
    return finished


def _connect(device: str | None, timeout_seconds: float | None) -> torch.device:
    """Join the launcher's process group (or make one of a single process), and pick the device."""
    chosen = setup_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    watchdog.join(chosen, timeout_seconds)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return chosen
