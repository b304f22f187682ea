"""An EMA of any length after training, from the power-function averages that a run stored.

EDM2 (arXiv 2312.02696), section 3.2: training tracks two lengths, every checkpoint and EMA-only
snapshot stores both, and a linear combination of all of these approximates any other length.
"""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from diffmoe.checkpoints.checksums import wrong_sizes
from diffmoe.checkpoints.folder import names
from diffmoe.checkpoints.inspect import StoredCheckpoint, open_checkpoint
from diffmoe.checkpoints.lifecycle import commit, temporary
from diffmoe.checkpoints.pieces import Piece, write_pieces
from diffmoe.checkpoints.profiles import Profile, power_prefix, reconstruct
from diffmoe.checkpoints.run_file import PosthocAverage, read_run_file
from diffmoe.errors import UserError


class Reconstructed(NamedTuple):
    """What `reconstruct_ema` wrote.

    step: at which the average was taken. snapshots: how many folders it was computed from. error:
    of its profile, relative (profiles.Reconstruction).
    """

    path: Path
    step: int
    snapshots: int
    error: float


@dataclass(frozen=True)
class Combination:
    """A linear combination of stored averages, computed tensor by tensor.

    std: its relative length. newest: the open checkpoint of its step, whose buffers belong to it.
    shares: per open checkpoint, the coefficient of each of its averages, by prefix. error: as in
    Reconstructed.
    """

    std: float
    newest: StoredCheckpoint
    shares: list[tuple[StoredCheckpoint, dict[str, float]]]
    error: float

    def names(self) -> list[str]:
        """Names of the parameters, in the network's order."""
        prefix = next(prefix for _, share_of in self.shares for prefix in share_of)
        stored = next(stored for stored, share_of in self.shares if prefix in share_of)
        keys = (key.partition("/") for key in stored.shapes)
        return [name for found, _, name in keys if found == prefix]

    def read(self, name: str) -> torch.Tensor:
        """One parameter, fp32, in its global shape; summed in fp64."""
        total = torch.zeros(self.newest.parameters[name], dtype=torch.float64)
        for stored, share_of in self.shares:
            for prefix, share in share_of.items():
                total.add_(stored.read(f"{prefix}/{name}").double(), alpha=share)
        return total.float()


@contextlib.contextmanager
def combined_average(run: Path, std: float, step: int | None = None) -> Iterator[Combination]:
    """The average of relative length `std` at a step that the run has stored; default the newest.

    Reading needs memory for one tensor. Raises UserError if the run stored no averages, or none at
    this step.
    """
    stored = dict(_stored_averages(run))
    if not stored:
        raise UserError(
            f"{run} holds no power-function average: no complete step-XXXXXXXX or ema-XXXXXXXX of "
            "a run with training.ema_stds=[0.05,0.1]"
        )
    by_step = {read_run_file(path).clock.step: path for path in stored.values()}
    if step is not None and step not in by_step:
        raise UserError(
            f"{run} holds no power-function average of step {step}; stored are "
            f"{', '.join(map(str, sorted(by_step)))}"
        )
    newest = by_step[max(by_step) if step is None else step]
    wanted = Profile(std, read_run_file(newest).clock.updates)
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
    """Write the `combined_average` to `out` as an EMA snapshot, which samples like any other.

    It holds ema/NAME and the buffers of that step. Needs memory for the whole network and one more
    tensor. Raises UserError as `combined_average` does, and if `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another --out")
    with combined_average(run, std, step) as average:
        newest = average.newest
        state: dict[str, torch.Tensor] = {
            f"ema/{name}": Piece.whole(average.read(name)) for name in average.names()
        }
        for key in newest.shapes:
            if key.startswith("buffers/"):
                state[key] = newest.read(key).float()
        sources = [stored.path.name for stored, _ in average.shares]
        made = PosthocAverage.model_validate({"std": std, "error": average.error, "from": sources})
        record = newest.record.model_copy(update={"reconstructed": made})
        unfinished = temporary(out)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        commit(unfinished, out, record, write_pieces(state, unfinished, None))
        return Reconstructed(out, record.clock.step, len(average.shares), average.error)


def _stored_averages(run: Path) -> Iterator[tuple[Profile, Path]]:
    """All power-function averages of a run's folder.

    Checkpoints come last, so that in a dict they replace snapshots of the same step, which may be
    in bf16.
    """
    for path in [run / name for kind in ("ema", "step") for name in names(run, kind)]:
        if wrong_sizes(path):
            continue
        record = read_run_file(path)
        if record.reconstructed is None:
            for std in record.settings.training.ema_stds:
                yield Profile(std, record.clock.updates), path
