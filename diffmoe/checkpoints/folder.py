"""A run's folder of checkpoints: which are whole, which is the newest, which may go.

A checkpoint is a folder step-XXXXXXXX: run.json, the files of torch.distributed.checkpoint, and
checksums.json with the size and SHA-256 of every other file, written last. It is written under a
hidden name, fsynced, and renamed, so that whatever carries the name was complete once. `latest`
names the newest for people; programs look at what is there. Copies under other names, such as
step-best, are read where they are asked for and else left alone.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.files import open_regular, read_bytes, read_text, sha256_of, sync, write_atomically

CHECKSUMS, ABOUT = "checksums.json", "run.json"
KINDS = ("step", "ema")
ABANDONED = "abandoned-"  # before the name of what was set aside
_Count = Annotated[int, Field(ge=0, lt=1 << 53)]


class _Clock(BaseModel):
    samples: _Count
    step: _Count
    skipped: _Count


class _SavedBy(BaseModel):
    world: int = Field(ge=1)


class _Record(BaseModel):
    """run.json, as far as its readers rely on it; `config` has its own check."""

    clock: _Clock
    optimizer_steps: _Count
    config: dict[str, Any]
    latents: dict[str, Any]
    saved_by: _SavedBy


def names(folder: Path, kind: str = "step") -> list[str]:
    """A run's checkpoints, or with `ema` its snapshots, by name, whole or not, oldest first.

    Those count that a run writes: of such a name, with that step on their clock. Raises UserError
    for a folder that cannot be listed.
    """
    found = [name for name in _listed_in(folder) if _step(name, kind) is not None]
    return sorted((name for name in found if not _is_copy(folder / name)), key=_step)


def copies(folder: Path) -> list[Path]:
    """What looks like a checkpoint of the run and does not count: step-best, say."""
    counted = names(folder)
    found = sorted(name for name in _listed_in(folder) if name.startswith("step-"))
    return [folder / name for name in found if name not in counted]


def later(checkpoint: Path) -> list[Path]:
    """The checkpoints and EMA snapshots of the same folder that are of later steps."""
    run, step = checkpoint.parent, read_about(checkpoint)["clock"]["step"]
    return [run / name for kind in KINDS for name in names(run, kind) if _step(name) > step]


def _step(name: str, kind: str = "step|ema") -> int | None:
    """The step in a name that a run gives; None for other names."""
    found = re.fullmatch(rf"(?:{kind})-([0-9]{{8}}|[1-9][0-9]{{8,}})", name)
    return int(found[1]) if found else None


def _is_copy(checkpoint: Path) -> bool:
    """Whether the clock inside, undamaged, says another step than the name."""
    try:
        about = read_bytes(checkpoint / ABOUT)
        undamaged = hashlib.sha256(about).hexdigest() == _listed(checkpoint)[ABOUT]["sha256"]
        return undamaged and read_about(checkpoint)["clock"]["step"] != _step(checkpoint.name)
    except (OSError, UserError):  # it counts, and whoever wants it is told what is wrong
        return False


def _samples(checkpoint: Path) -> int | None:
    """The clock inside; None if it is damaged."""
    try:
        return read_about(checkpoint)["clock"]["samples"]
    except UserError:
        return None


def _listed_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}") from None


def temporary(checkpoint: Path, writer: str = "") -> Path:
    """Where a checkpoint is written until it is complete. writer: a word that no other run uses."""
    return checkpoint.with_name(f".{checkpoint.name}{writer and '.'}{writer}.tmp")


def leftovers(folder: Path) -> list[Path]:
    """What kills left of unfinished saves and deletions."""
    found = (
        re.fullmatch(r"\.(?:abandoned-)?(.*?)(?:\.[0-9a-f]+)?\.tmp", name)
        for name in _listed_in(folder)
    )
    return sorted(folder / f[0] for f in found if f and _step(f[1]) is not None)


def is_checkpoint(path: Path) -> bool:
    """Whether it is a checkpoint's folder, by its checksums; a run's folder is none."""
    try:
        (path / CHECKSUMS).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from None
    return True


def complete(path: str | Path) -> Path:
    """The folder of a complete checkpoint: itself, or the newest of a run's folder.

    Checks sizes, not hashes. Prints what it passes over.
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
        print(f"warning: {path / name} is passed over: {problems[0]}")
    raise UserError(
        f"{path} is no complete checkpoint (it has no {CHECKSUMS}), nor does it hold one; give a "
        "folder step-XXXXXXXX, or a run's folder"
    )


def wrong_sizes(checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Files that checksums.json lists and that are missing, of another size, or not readable.

    part, parts: ranks share the files, so that their looks do not grow with world squared.
    """
    try:
        listed = _listed(checkpoint)
    except UserError as error:
        return [str(error)]
    problems = []
    for name, entry in sorted(listed.items())[part::parts]:
        file = checkpoint / name
        try:
            with open_regular(file) as opened:
                size = os.fstat(opened.fileno()).st_size
        except (FileNotFoundError, NotADirectoryError):
            problems.append(f"{file} is missing")
        except OSError as error:
            problems.append(f"{file} cannot be read: {error.strerror}")
        else:
            if size != entry["bytes"]:
                problems.append(f"{file} has {size} bytes, not {entry['bytes']}")
    return problems


def verify(
    checkpoint: str | Path,
    part: int = 0,
    parts: int = 1,
    digest: Callable[[Path], str] = sha256_of,
) -> list[str]:
    """What is wrong with a checkpoint: sizes, then SHA-256; empty if it is whole.

    part, parts: ranks share the files. digest: gives a file's SHA-256; the default reads it.
    """
    checkpoint = Path(checkpoint)
    problems = wrong_sizes(checkpoint, part, parts)
    if problems:
        return problems
    for name, entry in sorted(_listed(checkpoint).items())[part::parts]:
        try:
            found = digest(checkpoint / name)
        except OSError as error:
            problems.append(f"{checkpoint / name} cannot be read: {error.strerror}")
            continue
        if found != entry["sha256"]:
            problems.append(f"{checkpoint / name} is damaged: its SHA-256 is not that of the save")
    return problems


def _listed(checkpoint: Path) -> dict[str, dict[str, Any]]:
    file = checkpoint / CHECKSUMS
    try:
        listed = json.loads(read_bytes(file))["files"]
        for name, entry in listed.items():
            os.fsencode(name)  # raises for what can be no file's name
            if name != Path(name).name or "\0" in name:
                raise ValueError(f"{name!r} is no name of a file in this folder")
            if type(entry["bytes"]) is not int or type(entry["sha256"]) is not str:
                raise ValueError(f"size and SHA-256 of {name}")
        listed[ABOUT]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{checkpoint} is not complete: it has no {CHECKSUMS}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error})") from None
    return listed


def read_about(checkpoint: Path) -> dict[str, Any]:
    """run.json: clock, configuration, versions."""
    file = checkpoint / ABOUT
    older = "take an older checkpoint by its PATH, step-XXXXXXXX"
    try:
        about = json.loads(read_text(file))
        missing = {"clock", "optimizer_steps", "config", "latents"} - set(about)
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        _Record.model_validate(about)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; {older}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        told = f"{'.'.join(map(str, problem['loc']))}={problem['input']!r:.40}: {problem['msg']}"
        raise UserError(f"{file} is damaged ({told}); {older}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); {older}") from None
    return about


def stored_config(checkpoint: Path, about: dict[str, Any]) -> Config:
    """The run's configuration out of `read_about`, without any permission to run commands."""
    try:
        config = Config.model_validate(about["config"])
        return config.replace({"data.allow_commands": False})
    except ValidationError as error:
        file = checkpoint / ABOUT
        raise UserError(f"{file} holds a configuration of another version: {error}") from None


def commit(
    torn: Path, checkpoint: Path, about: dict[str, Any], files: dict[str, dict[str, Any]]
) -> None:
    """Turn the temporary folder, whose `files` are on the disk, into a complete checkpoint."""
    text = json.dumps(about, indent=1)
    write_atomically(torn / ABOUT, text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    files = files | {ABOUT: {"bytes": len(text.encode()), "sha256": digest}}
    write_atomically(torn / CHECKSUMS, json.dumps({"files": files}, indent=1))
    set_aside(checkpoint)
    torn.rename(checkpoint)
    sync(checkpoint.parent)


def set_aside(checkpoint: Path) -> Path | None:
    """Take a checkpoint out of the run's sequence, to abandoned-step-XXXXXXXX."""
    if not os.path.lexists(checkpoint):
        return None
    aside = checkpoint.with_name(ABANDONED + checkpoint.name)
    remove(aside)
    checkpoint.rename(aside)
    return aside


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """While this is open `prune` leaves the checkpoint alone, in whatever process it runs."""
    try:
        file = open_regular(checkpoint / CHECKSUMS)
    except OSError:  # reading will tell what is missing
        yield
        return
    with file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def prune(folder: Path, keep_last: int, keep_samples: int | None) -> list[str]:
    """Delete what retention does not ask for; returns the names.

    Kept are the last `keep_last` complete checkpoints and the first at or after every multiple of
    `keep_samples`. Incomplete ones do not count and are left, as is one that somebody reads. What
    was set aside goes as soon as `keep_last` whole ones are not older than it.
    """
    keep_last = max(1, keep_last)
    samples = {
        name: _samples(folder / name) for name in names(folder) if not wrong_sizes(folder / name)
    }
    whole = [name for name, clock in samples.items() if clock is not None]
    kept, before = set(whole[-keep_last:]), 0
    for name in whole if keep_samples else []:
        if samples[name] // keep_samples > before // keep_samples:
            kept.add(name)
        before = samples[name]
    gone = [name for name in whole if name not in kept]
    for name in _listed_in(folder) if len(whole) >= keep_last else []:
        step = _step(name.removeprefix(ABANDONED)) if name.startswith(ABANDONED) else None
        if step is not None and step <= _step(whole[-keep_last]):
            gone.append(name)
    return [name for name in gone if _delete(folder / name)]


def _delete(checkpoint: Path) -> bool:
    """Remove a checkpoint unless it is being read; a kill meanwhile leaves no half of it.

    Raises UserError if it cannot be removed.
    """
    with contextlib.ExitStack() as stack:
        try:
            # Over NFS an exclusive lock asks for a file opened for writing.
            file = stack.enter_context(open(checkpoint / CHECKSUMS, "r+b"))
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
    """A folder with all it holds, as far as that is allowed; of a link, the link alone."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)
