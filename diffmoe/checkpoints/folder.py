"""The checkpoints in a run's folder: which there are, which are complete, which is the newest.

A checkpoint is a folder step-XXXXXXXX with run.json (run_file.py), tensors (index.py, pieces.py)
and checksums.json (checksums.py). It is written under a hidden name and then renamed
(lifecycle.py), so that whatever has the name was complete once. The file `latest` names the newest
one for people; programs look at the folders. Copies under other names, such as step-best, are used
only where they are asked for.
"""

import hashlib
import os
import re
from pathlib import Path

from diffmoe.checkpoints import checksums, run_file
from diffmoe.checkpoints.checksums import read_checksums, wrong_sizes
from diffmoe.checkpoints.run_file import read_run_file
from diffmoe.errors import UserError
from diffmoe.files import does_not_exist, read_bytes

KINDS = ("step", "ema")  # checkpoints, and snapshots of the averages alone
ABANDONED = "abandoned-"  # prefix of checkpoints that were set aside


def names(folder: Path, kind: str = "step") -> list[str]:
    """Names of a run's checkpoints (or `ema` snapshots), complete or not, oldest first.

    Only those that the run wrote itself: their clock is at the step of their name. Raises UserError
    if the folder cannot be listed.
    """
    found = [name for name in list_folder(folder) if step_in_name(name, kind) is not None]
    written = [name for name in found if not _is_copy(folder / name)]
    return sorted(written, key=step_of)


def checkpoints_of(run: str | Path) -> list[Path]:
    """A run's checkpoints and EMA-only snapshots, complete or not: snapshots first, oldest first.

    Raises UserError if there are none.
    """
    run = Path(run)
    found = [run / name for kind in ("ema", "step") for name in names(run, kind)]
    if not found:
        if not run.exists():
            raise UserError(
                f"{does_not_exist(run)}; give a run's output, which holds step-XXXXXXXX"
            )
        what = "holds no checkpoint" if run.is_dir() else "is not a folder"
        raise UserError(f"{run} {what}; give a run's output, which holds step-XXXXXXXX")
    return found


def copies(folder: Path) -> list[Path]:
    """Folders that look like checkpoints but were not written by the run, such as step-best."""
    counted = names(folder)
    found = sorted(name for name in list_folder(folder) if name.startswith("step-"))
    return [folder / name for name in found if name not in counted]


def later_than(checkpoint: Path) -> list[Path]:
    """The checkpoints and EMA snapshots in the same folder that are of later steps."""
    run, step = checkpoint.parent, read_run_file(checkpoint).clock.step
    found = [name for kind in KINDS for name in names(run, kind)]
    return [run / name for name in found if step_of(name) > step]


def leftovers(folder: Path) -> list[Path]:
    """What interrupted saves and deletions left behind."""
    found = (
        re.fullmatch(r"\.(?:abandoned-)?(.*?)(?:\.[0-9a-f]+)?\.tmp", name)
        for name in list_folder(folder)
    )
    return sorted(folder / f[0] for f in found if f and step_in_name(f[1]) is not None)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint (it has checksums.json), and not, say, a run's folder."""
    try:
        (path / checksums.FILE_NAME).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read: {reason}") from None
    return True


def find_complete(path: str | Path) -> Path:
    """A complete checkpoint: `path` itself, or the newest one if it is a run's folder.

    Checks sizes, not hashes. Prints a warning for each damaged checkpoint that it skips.
    """
    path = Path(path)
    if is_checkpoint(path):
        problems = wrong_sizes(path)
        if problems:
            raise UserError(f"{path} is damaged: {problems[0]}; take an older checkpoint")
        return path
    for name in reversed(names(path)):
        problems = wrong_sizes(path / name)
        if not problems:
            return path / name
        print(f"warning: {path / name} is skipped: {problems[0]}")
    if not path.exists():
        raise UserError(
            f"{does_not_exist(path)}; give a run's folder, a checkpoint step-XXXXXXXX, or a "
            "converted model"
        )
    raise UserError(
        f"{path} is not a complete checkpoint (it has no {checksums.FILE_NAME}) and holds none; "
        "give a folder step-XXXXXXXX, or a run's folder"
    )


def step_in_name(name: str, kind: str = "step|ema") -> int | None:
    """The step in the name of a checkpoint; None for other names."""
    found = re.fullmatch(rf"(?:{kind})-([0-9]{{8}}|[1-9][0-9]{{8,}})", name)
    return int(found[1]) if found else None


def step_of(name: str) -> int:
    """The step of a checkpoint that `names` has listed."""
    return int(name.rpartition("-")[2])


def list_folder(folder: Path) -> list[str]:
    """Sorted; empty if there is no such folder. Raises UserError if it cannot be listed."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}") from None


def _is_copy(checkpoint: Path) -> bool:
    """Whether an undamaged run.json gives another step than the folder's name."""
    try:
        content = read_bytes(checkpoint / run_file.FILE_NAME)
        expected = read_checksums(checkpoint)[run_file.FILE_NAME]["sha256"]
        undamaged = hashlib.sha256(content).hexdigest() == expected
        return undamaged and read_run_file(checkpoint).clock.step != step_in_name(checkpoint.name)
    except (OSError, UserError):  # counts as a checkpoint; whoever reads it reports the problem
        return False
