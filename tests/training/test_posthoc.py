"""An average reconstructed after training equals the one that a run tracked."""

from pathlib import Path

import pytest
import torch

from diffmoe.checkpoints.folder import read_about, verify
from diffmoe.checkpoints.network import load_network
from diffmoe.checkpoints.posthoc import reconstruct_ema
from diffmoe.config import Config
from diffmoe.errors import UserError
from tests.helpers.runs import assert_identical, newest, pack, run_config, tensors, train

pytestmark = pytest.mark.slow

STEPS = 24


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Config:
    """A run that keeps two lengths: an EMA-only snapshot every second step, one checkpoint."""
    folder = tmp_path_factory.mktemp("posthoc")
    pack(folder / "data")
    config = run_config(
        folder,
        STEPS,
        training__snapshot_samples=16,
        training__snapshot_precision="fp32",
        training__ema_stds=[0.05, 0.1],
        logging__log_samples=8 * STEPS,
    )
    train(config)
    return config


@pytest.fixture(scope="module")
def direct(stored: Config) -> Config:
    """The same run, tracking the lengths that the other is to reconstruct, and one that it has."""
    config = stored.replace(
        {
            "output": str(Path(stored.output).parent / "direct"),
            "training.ema_stds": [0.07, 0.1, 0.15],
            "training.checkpoint_samples": 8 * STEPS // 2,
            "training.snapshot_samples": None,
        }
    )
    train(config)
    assert_identical(
        *(
            {name: t for name, t in tensors(newest(config)).items() if name.startswith("weights/")}
            for config in (config, stored)
        )
    )
    return config


@pytest.mark.parametrize(
    ("std", "step", "bound"),
    [(0.07, None, 0.005), (0.15, None, 0.003), (0.1, STEPS // 2, 1e-6)],
)
def test_a_reconstructed_average_equals_the_tracked_one(
    tmp_path: Path, stored: Config, direct: Config, std: float, step: int | None, bound: float
):
    done = reconstruct_ema(Path(stored.output), std, tmp_path / "average", step)
    assert done.step == (step or STEPS)
    assert done.snapshots == done.step // 2
    found = tensors(tmp_path / "average")
    there = tensors(Path(direct.output) / f"step-{done.step:08d}")
    names = [name.removeprefix("ema/") for name in found if name.startswith("ema/")]
    assert len(names) == sum(name.startswith("weights/") for name in there)
    for name in names:
        tracked, weights = there[f"ema-{std}/{name}"], there[f"weights/{name}"]
        # Relative to how far averaging moves the tensor from its weights at all.
        scale = (tracked - weights).norm()
        error = (found[f"ema/{name}"] - tracked).norm()
        assert error <= bound * scale + 1e-6 * tracked.norm(), (name, float(error / scale))
    buffers = {name: t for name, t in there.items() if name.startswith("buffers/")}
    assert_identical({name: t for name, t in found.items() if name.startswith("buffers/")}, buffers)


def test_the_reconstruction_samples_like_a_snapshot(tmp_path: Path, stored: Config):
    out = Path(stored.output) / "ema-0.12"  # among the snapshots, and yet none of them
    done = reconstruct_ema(Path(stored.output), 0.12, out)
    again = reconstruct_ema(Path(stored.output), 0.12, tmp_path / "again")
    assert again.snapshots == done.snapshots
    assert_identical(tensors(again.path), tensors(out))
    assert verify(out) == []
    about = read_about(out)["reconstructed"]
    assert about["std"] == 0.12
    assert about["error"] == done.error < 0.02
    snapshots = [f"ema-{step:08d}" for step in range(2, STEPS, 2)]
    assert about["from"] == [*snapshots, f"step-{STEPS:08d}"]
    snapshot = load_network(out)
    assert snapshot.clock == {"samples": 8 * STEPS, "step": STEPS, "skipped": 0}
    found = tensors(out)
    for name, parameter in snapshot.network.named_parameters():
        assert torch.equal(parameter.flatten(), found[f"ema/{name}"]), name


def test_what_cannot_be_reconstructed_is_told(tmp_path: Path, stored: Config):
    run = Path(stored.output)
    with pytest.raises(UserError, match="no power-function average of step 3; stored are 2, 4, 6"):
        reconstruct_ema(run, 0.1, tmp_path / "average", step=3)
    with pytest.raises(UserError, match=r"std=0\.4: a relative length lies between 0 and"):
        reconstruct_ema(run, 0.4, tmp_path / "average")
    with pytest.raises(UserError, match="exists; choose another --out"):
        reconstruct_ema(run, 0.1, tmp_path)
    with pytest.raises(UserError, match=r"with training\.ema_stds=\[0\.05,0\.1\]"):
        reconstruct_ema(tmp_path, 0.1, tmp_path / "average")
    assert not any(tmp_path.iterdir())
