"""Real small runs: shards on disk, `start` on real ranks, and what a checkpoint holds."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from diffmoe.checkpoints.pieces import IndexReader
from diffmoe.config import Config
from diffmoe.data.captions import Captions
from diffmoe.data.manifest import Manifest
from diffmoe.data.packing import ShardWriter
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_config

HALF = "step-00000003"  # where `half_of` leaves a run
SAMPLES = [7, 5, 6, 8, 4, 6]  # 36 of uneven shards: with batches of 8 an epoch ends mid-step


def pack(
    folder: Path,
    counts: list[int] | None = None,
    wrong_label: tuple[int, int] | None = None,
    first: int = 0,
    **changes: Any,
) -> Path:
    """A data folder that fits `tiny_config`; with `text` of bytes two captions a sample.

    With `features` random ones; nothing else in the shards' members depends on them.
    wrong_label: (sample, the label it gets). first: number of the first sample.
    """
    counts = counts or SAMPLES
    fields: dict[str, Any] = {
        "content": "sample",
        "scaled": True,
        "shape": (2, 8, 8),
        "flips": False,
        "classes": 5,
        "autoencoder": "identity",
        "source": "tests",
    }
    with ShardWriter(folder, counts, **{**fields, **changes}) as writer:
        for i in range(first, first + sum(counts)):
            array = np.random.default_rng(i).standard_normal(writer.manifest.array_shape)
            label = wrong_label[1] if wrong_label and i == wrong_label[0] else i % 5
            captions = Captions([f"{i}", f"no {i}"]) if "text" in changes else None
            features = [
                random_features(writer.manifest, i) for _ in writer.manifest.feature_members
            ]
            writer.add(
                f"{i:05d}", label, array.astype(np.float32), captions=captions, features=features
            )
    return folder


def random_features(manifest: Manifest, sample: int) -> np.ndarray:
    """Of a sample, as an image encoder's."""
    assert manifest.features is not None
    drawn = np.random.default_rng([sample, 1]).standard_normal(manifest.features.shape)
    return drawn.astype(np.float16)


def run_config(folder: Path, steps: int, **changes: Any) -> Config:
    """A run in `folder`, on the shards in folder/data; saved once at its end, a metric a step."""
    values = {
        "output": str(folder / "run"),
        "data__path": str(folder / "data"),
        "training__total_samples": 8 * steps,
        "training__ema_decay": 0.8,
        "training__keep_last": 100,
        "optimizer__learning_rate": 0.01,
        "logging__log_samples": 8,
    }
    return tiny_config(**{**values, **changes})


def train(
    config: Config,
    world: int = 1,
    resume: str = "auto",
    prepare: Callable[[int], None] | None = None,
    ds_config: str | None = None,
    device: str = "cpu",
    allow_changed: list[str] | None = None,
) -> list[bool]:
    """One run of `start` on real ranks; what it returned on each.

    prepare: called on every rank, with its number, before the start; can be sent to a process.
    """
    return run_ranks(
        world,
        _start_on_rank,
        config,
        resume,
        prepare,
        ds_config,
        device,
        allow_changed,
        connect=False,
    )


def _start_on_rank(
    config: Config,
    resume: str,
    prepare: Callable[[int], None] | None,
    ds_config: str | None,
    device: str,
    allow_changed: list[str] | None = None,
) -> bool:
    from diffmoe.training.start import start

    # As in a plain process: ranks of a fork server would start readers by another fork server.
    multiprocessing.set_start_method("fork", force=True)
    if prepare is not None:
        prepare(int(os.environ["RANK"]))
    return start(config, ds_config, resume, device, allow_changed=allow_changed)


class SignalDuringStep:
    """Sends a signal to one rank of a run while it works on a step."""

    def __init__(self, step: int, number: int = signal.SIGTERM, rank: int = 0) -> None:
        self.step, self.number, self.rank = step, number, rank

    def __call__(self, rank: int) -> None:
        from diffmoe.training.step import TrainingStep

        run = TrainingStep.run

        def interrupted(step, *arguments, **options):
            if rank == self.rank and step.number == self.step - 1:
                os.kill(os.getpid(), self.number)
            return run(step, *arguments, **options)

        TrainingStep.run = interrupted


def half_of(run: Config, folder: Path, **changes) -> Config:
    """A run that has come as far as three steps of it."""
    values = {key.replace("__", "."): value for key, value in changes.items()}
    config = run.replace({"output": str(folder / "run"), **values})
    shutil.copytree(Path(run.output) / HALF, Path(config.output) / HALF)
    (Path(config.output) / "latest").write_text(HALF)
    return config


def newest(config: Config) -> Path:
    folder = Path(config.output)
    return folder / (folder / "latest").read_text()


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every named tensor of a checkpoint, whole (flat, except buffers)."""
    reader = IndexReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    state = {name: torch.full(item.size, torch.nan) for name, item in stored.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def clock(checkpoint: Path) -> dict[str, int]:
    return json.loads((checkpoint / "run.json").read_text())["clock"]


def metrics(config: Config) -> list[dict[str, Any]]:
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit: names, shapes and values."""
    assert found.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert differing == []
