"""From the command line to the loop: process group, checks, output folder, resume."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import yaml

from diffmoe.config import Config
from diffmoe.data.manifest import Manifest
from diffmoe.errors import UserError
from diffmoe.parallel.topology import create_topology
from diffmoe.parallel.zero import engine_settings, read_ds_config, reconcile
from diffmoe.training.checkpoint import Checkpoints, complete, write_atomically
from diffmoe.training.loop import train
from diffmoe.training.signals import StopRequest

# What may change between two starts in one output folder; the rest decides the numbers of a run.
_FREE = (
    "output",
    "data.path",
    "data.workers",
    "training.total_samples",
    "training.checkpoint_samples",
    "training.activation_checkpointing",
    "parallel",
    "logging",
)


def start(
    config: Config,
    ds_config: str | None = None,
    resume: str = "auto",
    device: str | None = None,
    print_only: bool = False,
) -> bool:
    """Check everything, then train. Returns False if the run was asked to stop before its end.

    resume: auto, never, or a path (see train.py). Raises UserError before any work starts.
    """
    settings = read_ds_config(ds_config) if ds_config else {}
    config = reconcile(config, settings, ds_config or "")
    if print_only:
        print(config.to_yaml(), end="")
        return True
    # Before the checks: what machines find may differ, and joined ranks tell a failure once.
    chosen = _connect(device)
    world = dist.get_world_size()
    config.check_world(world)
    engine_settings(config, settings, world)
    check_data(config)
    checkpoint = find_checkpoint(config, resume)

    topology = create_topology(config.parallel.expert_parallel)
    stop = StopRequest()
    dist.barrier()  # every rank has looked at the output before the first one writes there
    if topology.rank == 0:
        Path(config.output).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(config.output) / "config.yaml", config.to_yaml())
    finished = train(config, topology, chosen, settings, checkpoint, stop)
    dist.destroy_process_group()
    return finished


def check_data(config: Config) -> None:
    """Hold the shards and their manifest against the configuration."""
    if config.data.path is None:
        raise UserError(
            "data.path is not set: give the folder of shards, data.path=DIR "
            "(python tools/prepare_data.py --help makes one)"
        )
    manifest = Manifest.load(config.data.path)
    manifest.check(config.data.path, lanes=config.data.lanes)
    model = config.model
    manifest.check_model(model.in_channels, model.input_size, model.num_classes)


def find_checkpoint(config: Config, resume: str) -> Path | None:
    """The checkpoint to go on from, or None to start fresh."""
    output = Checkpoints(Path(config.output))
    _refuse_other_configuration(config)
    if resume not in ("auto", "never"):
        path = complete(resume)
        # Not `newest`: this is the way out of an output whose newest checkpoint is broken.
        if output.names() and path.resolve().parent != output.folder.resolve():
            raise UserError(
                f"--resume {resume} would continue in output={config.output}, which holds "
                f"{output.names()[-1]} of its own; choose another output"
            )
        return path
    newest = output.newest()
    if resume == "never" and newest is not None:
        raise UserError(
            f"--resume never, but output={config.output} holds {newest.name}; choose another output"
        )
    return newest


def _refuse_other_configuration(config: Config) -> None:
    stored_path = Path(config.output) / "config.yaml"
    if not stored_path.exists():
        return
    stored = _dotted(yaml.safe_load(stored_path.read_text()) or {})
    now = _dotted(config.model_dump(mode="json"))
    differing = [
        f"  {key}: {stored.get(key)} there, {now.get(key)} now"
        for key in sorted(stored.keys() | now.keys())
        if stored.get(key) != now.get(key)
        and not any(key == free or key.startswith(free + ".") for free in _FREE)
    ]
    if differing:
        raise UserError(
            f"output={config.output} belongs to a run of another configuration:\n"
            + "\n".join(differing)
            + "\nchoose another output=..., with --resume PATH to go on from that run's weights"
        )


def _dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _connect(device: str | None) -> torch.device:
    """Join the launcher's process group (or make one of a single process), and pick the device."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU; use --device cpu")
    chosen = torch.device(device)
    if device == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TF32, as the paper trains
    # gloo beside nccl: checkpoints gather their plans on the CPU.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    else:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return chosen
