"""A run's folder of checkpoints: which are whole, which is the newest, which may go.

A checkpoint is a folder step-XXXXXXXX: run.json, the files of torch.distributed.checkpoint, and
checksums.json with the size and SHA-256 of every other file, written last. It is written under a
hidden name, fsynced, and renamed, so that whatever carries the name was complete once. `latest`
names the newest for people; programs look at what is there.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.files import open_regular, read_json, read_text, sha256_of, sync, write_atomically

CHECKSUMS, ABOUT = "checksums.json", "run.json"
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


def names(folder: Path) -> list[str]:
    """All that is there under a checkpoint's name, whole or not, oldest first."""
    return sorted(path.name for path in folder.glob("step-*"))


def later(checkpoint: Path) -> list[Path]:
    """The checkpoints and EMA snapshots of the same folder that are of later steps."""
    number = checkpoint.name.partition("-")[2]
    found = [path for kind in ("step", "ema") for path in checkpoint.parent.glob(f"{kind}-*")]
    return sorted(path for path in found if path.name.partition("-")[2] > number)


def temporary(checkpoint: Path) -> Path:
    """Where a checkpoint is written until it is complete."""
    return checkpoint.with_name(f".{checkpoint.name}.tmp")


def leftovers(folder: Path) -> list[Path]:
    """What kills left of unfinished saves and deletions."""
    return sorted(p for kind in ("step", "ema") for p in folder.glob(f".{kind}-*.tmp"))


def complete(path: str | Path) -> Path:
    """The folder of a complete checkpoint: itself, or the newest of a run's folder.

    Checks sizes, not hashes. Prints what it passes over.
    """
    path = Path(path)
    if (path / CHECKSUMS).exists():
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
    """Files that checksums.json lists and that are missing or of another size.

    part, parts: ranks share the files, so that their looks do not grow with world squared.
    """
    try:
        listed = _listed(checkpoint)
    except UserError as error:
        return [str(error)]
    problems = []
    for name, entry in sorted(listed.items())[part::parts]:
        file = checkpoint / name
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif file.stat().st_size != entry["bytes"]:
            problems.append(f"{file} has {file.stat().st_size} bytes, not {entry['bytes']}")
    return problems


def verify(checkpoint: str | Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint: sizes, then SHA-256; empty if it is whole.

    part, parts: ranks share the files.
    """
    checkpoint = Path(checkpoint)
    problems = wrong_sizes(checkpoint, part, parts)
    if problems:
        return problems
    for name, entry in sorted(_listed(checkpoint).items())[part::parts]:
        try:
            found = sha256_of(checkpoint / name)
        except OSError as error:
            problems.append(f"{checkpoint / name} cannot be read: {error.strerror}")
            continue
        if found != entry["sha256"]:
            problems.append(f"{checkpoint / name} is damaged: its SHA-256 is not that of the save")
    return problems


def _listed(checkpoint: Path) -> dict[str, dict[str, Any]]:
    file = checkpoint / CHECKSUMS
    if not file.exists():
        raise UserError(f"{checkpoint} is not complete: it has no {CHECKSUMS}")
    try:
        listed = read_json(file)["files"]
        for name, entry in listed.items():
            int(entry["bytes"]), str(entry["sha256"])
            if Path(name).name != name:
                raise ValueError(f"{name!r} is no file of this folder")
        listed[ABOUT]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
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


def commit(checkpoint: Path, about: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Turn the temporary folder, whose `files` are on the disk, into a complete checkpoint."""
    torn = temporary(checkpoint)
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
    if not checkpoint.exists():
        return None
    aside = checkpoint.with_name(f"abandoned-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
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
    `keep_samples`. Incomplete ones do not count and are left, as is one that somebody reads.
    """
    whole = [name for name in names(folder) if not wrong_sizes(folder / name)]
    kept, before = set(whole[-max(1, keep_last) :]), 0
    for name in whole if keep_samples else []:
        samples = read_about(folder / name)["clock"]["samples"]
        if samples // keep_samples > before // keep_samples:
            kept.add(name)
        before = samples
    return [name for name in whole if name not in kept and _delete(folder / name)]


def _delete(checkpoint: Path) -> bool:
    """Remove a checkpoint unless it is being read; a kill meanwhile leaves no half of it."""
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
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return True
