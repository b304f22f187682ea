"""An average of any length after the training, from the power-function averages it stored.

EDM2 (arXiv 2312.02696), section 3.2: training keeps two lengths, each checkpoint and each EMA-only
snapshot of the run holds both, and a combination of all of them comes close to any other.
"""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from diffmoe.checkpoints.folder import commit, names, read_about, temporary, wrong_sizes
from diffmoe.checkpoints.inspect import StoredCheckpoint, open_checkpoint
from diffmoe.checkpoints.pieces import Piece, write
from diffmoe.checkpoints.profiles import Profile, power_prefix, reconstruct
from diffmoe.errors import UserError


class Reconstructed(NamedTuple):
    """What `reconstruct_ema` wrote. error: of the profile, relative (profiles.Reconstruction)."""

    path: Path
    step: int
    snapshots: int
    error: float


@dataclass(frozen=True)
class Combination:
    """An average put together from stored ones, tensor by tensor.

    std: its relative length. newest: the open checkpoint of the step at which it is, whose buffers
    belong to it. shares: of the stored averages, by their prefix in each open checkpoint. error:
    as in Reconstructed.
    """

    std: float
    newest: StoredCheckpoint
    shares: list[tuple[StoredCheckpoint, dict[str, float]]]
    error: float

    def names(self) -> list[str]:
        """The parameters, in the network's order."""
        prefix = next(prefix for _, share_of in self.shares for prefix in share_of)
        stored = next(stored for stored, share_of in self.shares if prefix in share_of)
        keys = (key.partition("/") for key in stored.shapes)
        return [name for found, _, name in keys if found == prefix]

    def read(self, name: str) -> torch.Tensor:
        """One parameter, fp32, in its global shape; summed in fp64."""
        total: torch.Tensor | None = None
        for stored, share_of in self.shares:
            for prefix, share in share_of.items():
                part = stored.read(f"{prefix}/{name}").double()
                total = torch.zeros_like(part) if total is None else total
                total.add_(part, alpha=share)
        return total.float()


@contextlib.contextmanager
def combined(run: Path, std: float, step: int | None = None) -> Iterator[Combination]:
    """The average of relative length `std` as it was at a stored step of a run.

    step: one that the run has a checkpoint or snapshot of; the newest if None. Memory: one tensor.
    """
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
    with contextlib.ExitStack() as stack:
        opened = {path: stack.enter_context(open_checkpoint(path)) for path in shares}
        yield Combination(
            std, opened[newest], [(opened[path], shares[path]) for path in shares], found.error
        )


def reconstruct_ema(run: Path, std: float, out: Path, step: int | None = None) -> Reconstructed:
    """Write the average of `combined` as an EMA snapshot.

    The snapshot in `out` holds ema/NAME and the buffers of that step, and samples like any other.
    Needs memory for the whole network, and of the stored averages one tensor at a time.
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another --out")
    with combined(run, std, step) as average:
        newest = average.newest
        state = {f"ema/{name}": Piece.whole(average.read(name)) for name in average.names()}
        for key in newest.shapes:
            if key.startswith("buffers/"):
                state[key] = newest.read(key).float()
        about = newest.about | {
            "reconstructed": {
                "std": std,
                "error": average.error,
                "from": [stored.path.name for stored, _ in average.shares],
            }
        }
        torn = temporary(out)
        shutil.rmtree(torn, ignore_errors=True)
        torn.mkdir(parents=True)
        commit(torn, out, about, write(state, torn, None))
        return Reconstructed(out, _step(newest.path), len(average.shares), average.error)


def _stored(run: Path) -> Iterator[tuple[Profile, Path]]:
    """All power-function averages of a run's folder; a checkpoint, fp32, before a snapshot."""
    for path in [run / name for kind in ("ema", "step") for name in names(run, kind)]:
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
