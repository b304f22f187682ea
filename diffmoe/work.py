"""Work in parts that any number of processes share and that goes on after a kill at any moment.

A hidden folder keeps the plan, which says what every part is, and a record of each finished part,
written after the part itself: whatever lacks a record is made again.
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

from diffmoe.errors import UserError
from diffmoe.files import read_json, temporary_name, write_json

# Moving a file takes far less: a claim that is older belongs to a process that is no more.
CLAIM_SECONDS = 5.0


class Ranks(NamedTuple):
    """This process among those that share the work; they need no process group."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> "Ranks":
        """From torchrun's variables, or those of srun."""
        for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
            if rank in os.environ and world in os.environ:
                return cls(int(os.environ[rank]), int(os.environ[world]))
        return cls()


class Records:
    """The plan and the records of the work in `directory`, kept in its hidden folder `name`."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self.folder = directory, directory / name

    @property
    def begun(self) -> bool:
        return (self.folder / "plan.json").exists()

    def begin(self, plan: dict[str, Any], way_out: str) -> None:
        """Store the plan, or see that the one that is there is the same.

        Raises UserError naming what differs, and `way_out`.
        """
        stored = self.folder / "plan.json"
        if not stored.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(stored, plan)
        there = read_json(stored)
        plan = json.loads(json.dumps(plan))  # tuples become lists, as in the file
        differing = [
            f"{key}: {there.get(key)} there, {plan.get(key)} now"
            for key in sorted(there.keys() | plan.keys())
            if there.get(key) != plan.get(key)
        ]
        if differing:
            raise UserError(
                f"{self.directory} was begun with other settings or items "
                f"({'; '.join(differing)}); {way_out}"
            )

    def clear(self) -> None:
        for file in self.folder.glob("*"):
            file.unlink()

    def has(self, part: int) -> bool:
        return self._file(part).exists()

    def read(self, part: int) -> dict[str, Any]:
        return read_json(self._file(part))

    def write(self, part: int, record: dict[str, Any]) -> None:
        write_json(self._file(part), record)

    def _file(self, part: int) -> Path:
        return self.folder / f"{part:06d}.json"


def write_json_once(file: Path, value: Any) -> bool:
    """As write_json, but only if the file is not there; whether this process wrote it."""
    temporary = temporary_name(file)
    write_json(temporary, value)
    try:
        os.link(temporary, file)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        return _claimed(file) and _moved(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _claimed(file: Path) -> bool:
    """Whether this process may write the file: of those that ask at once, one may."""
    patience = time.monotonic() + CLAIM_SECONDS
    while not file.exists():
        try:
            _claim(file).touch(exist_ok=False)
        except FileExistsError:
            if time.monotonic() > patience:  # left by a process that was killed
                return True
            time.sleep(0.05)
        else:
            return True
    return False


def _moved(temporary: Path, file: Path) -> bool:
    """Move it there, unless another process has done so before this one had its claim."""
    try:
        if file.exists():
            return False
        os.replace(temporary, file)
        return True
    finally:
        _claim(file).unlink(missing_ok=True)


def _claim(file: Path) -> Path:
    return file.with_name(f"{file.name}.claim")


def writable(directory: Path) -> None:
    """Make a folder and see that it can be written, before work begins. Raises UserError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = temporary_name(directory / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from None


def remove_torn(directory: Path) -> None:
    """Remove temporary files of this machine's processes that are no longer alive."""
    for torn in directory.glob(f"*.{socket.gethostname()}-*.tmp"):
        process = torn.name.rsplit("-", 1)[1].removesuffix(".tmp")
        if process.isdecimal() and not _alive(int(process)):
            torn.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
