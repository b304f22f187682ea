"""A checkpoint from its first byte to its deletion: written aside, committed, set aside, pruned.

Whatever is interrupted, a folder named step-XXXXXXXX is complete or was never there.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from diffmoe.checkpoints import checksums, run_file
from diffmoe.checkpoints.checksums import Checksums, write_checksums, wrong_sizes
from diffmoe.checkpoints.folder import ABANDONED, list_folder, names, step_in_name, step_of
from diffmoe.checkpoints.run_file import RunFile, read_run_file
from diffmoe.errors import UserError
from diffmoe.files import open_regular, sync, write_atomically


def temporary(checkpoint: Path, writer: str = "") -> Path:
    """Where a checkpoint is written until it is complete. writer: a word unique to the run."""
    return checkpoint.with_name(f".{checkpoint.name}{writer and '.'}{writer}.tmp")


def commit(unfinished: Path, checkpoint: Path, record: RunFile, files: Checksums) -> None:
    """Turn a temporary folder into a complete checkpoint.

    files: already in the folder and on disk. record: written beside them, then the checksums.
    """
    text = record.json_text()
    write_atomically(unfinished / run_file.FILE_NAME, text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    own: Checksums = {run_file.FILE_NAME: {"bytes": len(text.encode()), "sha256": digest}}
    write_checksums(unfinished, files | own)
    set_aside(checkpoint)
    unfinished.rename(checkpoint)
    sync(checkpoint.parent)


def set_aside(checkpoint: Path) -> Path | None:
    """Rename a checkpoint to abandoned-step-XXXXXXXX, so that the run no longer counts it."""
    if not os.path.lexists(checkpoint):
        return None
    aside = checkpoint.with_name(ABANDONED + checkpoint.name)
    remove(aside)
    checkpoint.rename(aside)
    return aside


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Keep `prune`, in any process, from deleting the checkpoint while this is open."""
    try:
        file = open_regular(checkpoint / checksums.FILE_NAME)
    except OSError:  # whoever reads the checkpoint reports what is missing
        yield
        return
    with file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def prune(folder: Path, keep_last: int, keep_samples: int | None) -> list[str]:
    """Delete the checkpoints that need not be kept; returns their names.

    Kept are the last `keep_last` complete checkpoints (at least one), and the first one at or after
    every multiple of `keep_samples`. Incomplete ones are not counted and stay, as do those that
    are being read. Abandoned ones are deleted once `keep_last` complete checkpoints of their step
    or later exist.
    """
    keep_last = max(1, keep_last)
    samples = _samples_of_complete(folder)
    complete = list(samples)
    kept, before = set(complete[-keep_last:]), 0
    if keep_samples:
        for name in complete:
            if samples[name] // keep_samples > before // keep_samples:
                kept.add(name)
            before = samples[name]
    gone = [name for name in complete if name not in kept]
    for name in list_folder(folder) if len(complete) >= keep_last else []:
        step = step_in_name(name.removeprefix(ABANDONED)) if name.startswith(ABANDONED) else None
        if step is not None and step <= step_of(complete[-keep_last]):
            gone.append(name)
    return [name for name in gone if _delete(folder / name)]


def _samples_of_complete(folder: Path) -> dict[str, int]:
    """The clock of each complete checkpoint, by name, oldest first."""
    samples = {}
    for name in names(folder):
        if not wrong_sizes(folder / name):
            with contextlib.suppress(UserError):  # run.json is damaged
                samples[name] = read_run_file(folder / name).clock.samples
    return samples


def _delete(checkpoint: Path) -> bool:
    """Delete a checkpoint unless it is being read; an interruption leaves no half of it.

    Raises UserError if it cannot be deleted.
    """
    with contextlib.ExitStack() as stack:
        try:
            # Over NFS an exclusive lock needs a file opened for writing.
            file = stack.enter_context(open(checkpoint / checksums.FILE_NAME, "r+b"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks
            pass
        doomed = temporary(checkpoint)
        remove(doomed)
        try:
            checkpoint.rename(doomed)
        except OSError as error:
            raise UserError(f"{checkpoint} cannot be deleted: {error.strerror}") from None
        remove(doomed)
    return True


def remove(path: Path) -> None:
    """Delete a folder with its contents, as far as permissions allow; of a link, only the link."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
