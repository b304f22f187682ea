"""An average of any length after the training, from the power-function averages it stored.

EDM2 (arXiv 2312.02696), section 3.2: training keeps two lengths, each checkpoint and each EMA-only
snapshot of the run holds both, and a combination of all of them comes close to any other.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from diffmoe.checkpoints.folder import commit, read_about, temporary, wrong_sizes
from diffmoe.checkpoints.inspect import open_checkpoint
from diffmoe.checkpoints.pieces import Piece, write
from diffmoe.checkpoints.profiles import Profile, power_prefix, reconstruct
from diffmoe.errors import UserError


class Reconstructed(NamedTuple):
    """What `reconstruct_ema` wrote. error: of the profile, relative (profiles.Reconstruction)."""

    path: Path
    step: int
    snapshots: int
    error: float


def reconstruct_ema(run: Path, std: float, out: Path, step: int | None = None) -> Reconstructed:
    """Write the average of relative length `std`, as it was at a stored step, as an EMA snapshot.

    step: one that the run has a checkpoint or snapshot of; the newest if None. The snapshot in
    `out` holds ema/NAME and the buffers of that step, and samples like any other. Needs memory for
    the whole network in fp64; of the stored averages one tensor at a time.
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another --out")
    stored = dict(_stored(run))
    if not stored:
        raise UserError(
            f"{run} holds no power-function average: neither a complete step-XXXXXXXX nor an "
            "ema-XXXXXXXX of a run with training.ema_stds=[0.05,0.1]"
        )
    by_step = {_step(path): path for path in stored.values()}
    if step is not None and step not in by_step:
        raise UserError(
            f"{run} holds no power-function average of step {step}; stored are "
            f"{', '.join(map(str, sorted(by_step)))}"
        )
    newest = by_step[max(by_step) if step is None else step]
    wanted = Profile(std, _updates(newest))
    stored = {profile: path for profile, path in stored.items() if profile.steps <= wanted.steps}
    found = reconstruct(list(stored), wanted)

    shares: dict[Path, dict[str, float]] = {}
    for (profile, path), share in zip(stored.items(), found.coefficients, strict=True):
        shares.setdefault(path, {})[power_prefix(profile.std)] = float(share)
    state: dict[str, torch.Tensor] = {}
    for path, share_of in shares.items():
        with open_checkpoint(path) as checkpoint:
            for key in checkpoint.shapes:
                prefix, _, name = key.partition("/")
                if prefix == "buffers" and path == newest:
                    state[key] = checkpoint.read(key).float()
                elif prefix in share_of:
                    stored_average = checkpoint.read(key).double()
                    total = state.setdefault(f"ema/{name}", torch.zeros_like(stored_average))
                    total.add_(stored_average, alpha=share_of[prefix])
    for key in state:
        if key.startswith("ema/"):
            state[key] = Piece.whole(state[key].float())

    about = read_about(newest) | {
        "reconstructed": {
            "std": std,
            "error": found.error,
            "from": [path.name for path in shares],
        }
    }
    torn = temporary(out)
    shutil.rmtree(torn, ignore_errors=True)
    torn.mkdir(parents=True)
    commit(out, about, write(state, torn, None))
    return Reconstructed(out, _step(newest), len(shares), found.error)


def _stored(run: Path) -> Iterator[tuple[Profile, Path]]:
    """All power-function averages of a run's folder; a checkpoint, fp32, before a snapshot."""
    for path in [*sorted(run.glob("ema-*")), *sorted(run.glob("step-*"))]:
        if wrong_sizes(path) or "reconstructed" in read_about(path):
            continue
        for std in read_about(path)["config"]["training"].get("ema_stds", []):
            yield Profile(std, _updates(path)), path


def _updates(path: Path) -> int:
    """How often the averages had moved: steps, without skipped ones."""
    clock = read_about(path)["clock"]
    return clock["step"] - clock["skipped"]


def _step(path: Path) -> int:
    return read_about(path)["clock"]["step"]
