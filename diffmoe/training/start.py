"""From the command line to the loop: process group, checks, output folder, resume."""

from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from diffmoe.config import Config
from diffmoe.parallel.device import setup_device, use_deterministic_algorithms
from diffmoe.parallel.topology import create_topology
from diffmoe.parallel.zero import read_ds_config, reconcile
from diffmoe.training import agreement, preflight
from diffmoe.training.lease import hold
from diffmoe.training.loop import train
from diffmoe.training.resume import find_checkpoint, make_way
from diffmoe.training.signals import StopRequest
from diffmoe.training.telemetry import Telemetry
from diffmoe.training.watchdog import Watchdog, join


def start(
    config: Config,
    ds_config: str | None = None,
    resume: str = "auto",
    device: str | None = None,
    print_only: bool = False,
    allow_changed: list[str] | None = None,
) -> bool:
    """Check everything, then train. Returns False if the run was asked to stop before its end.

    resume: auto, none, or a path; allow_changed: fields (see train.py). Raises UserError before
    any work starts.
    """
    settings = read_ds_config(ds_config) if ds_config else {}
    config = reconcile(config, settings, ds_config or "")
    if print_only:
        print(config.explained(), end="")
        return True
    # Before the checks: what machines find may differ, and joined ranks tell a failure once.
    chosen, peers = _connect(device, config.parallel.timeout_seconds)
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
    with hold(Path(config.output)) as lease:
        going_on = find_checkpoint(config, resume, allow_changed)
        topology = create_topology(config.parallel.expert_parallel)
        stop = StopRequest()
        dist.barrier()  # every rank has looked at the output before the first one writes there
        if topology.rank == 0:
            make_way(config, going_on)
        telemetry = Telemetry(config, active=topology.rank == 0)
        finished = train(config, topology, chosen, settings, going_on, stop, lease, telemetry)
        peers.close()
        dist.destroy_process_group()
        telemetry.finish()  # no rank waits for it, and the exit code is decided
    return finished


def _connect(device: str | None, timeout_seconds: float | None) -> tuple[torch.device, Watchdog]:
    """Join the launcher's process group (or make one of a single process), and pick the device."""
    chosen = setup_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    peers = join(chosen, timeout_seconds)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return chosen, peers
