"""Work that is split into parts, shared by any number of processes, and resumable at any time.

A hidden folder keeps the plan, which defines the parts, and a record of each finished part, written
after the part itself. Parts without a record are made again.
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

from diffmoe.errors import UserError
from diffmoe.files import read_json, temporary_name, write_json

# Moving a file takes far less, so an older claim belongs to a process that has died.
CLAIM_SECONDS = 5.0


class Ranks(NamedTuple):
    """This process among those that share the work. They need no process group."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> "Ranks":
        """From the environment variables of torchrun or srun; without these, a single process."""
        for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
            if rank in os.environ and world in os.environ:
                return cls(int(os.environ[rank]), int(os.environ[world]))
        return cls()


class Records:
    """Plan and records of the work in `directory`, stored in its hidden folder `name`."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self.folder = directory, directory / name

    @property
    def begun(self) -> bool:
        return (self.folder / "plan.json").exists()

    def plan(self) -> dict[str, Any]:
        """As it was begun; empty if it was not."""
        return read_json(self.folder / "plan.json") if self.begun else {}

    def begin(
        self, plan: dict[str, Any], way_out: str, absent: dict[str, Any] | None = None
    ) -> None:
        """Store the plan, or compare it with the stored one.

        absent: what the keys stand for that an older plan does not have.

        Raises UserError naming what differs, and `way_out`, what to do then.
        """
        if not self.begun:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "plan.json", plan)
        before = (absent or {}) | self.plan()
        plan = json.loads(json.dumps(plan))  # tuples become lists, as in the file
        differing = [
            f"{key}: {before.get(key)} there, {plan.get(key)} now"
            for key in sorted(before.keys() | plan.keys())
            if before.get(key) != plan.get(key)
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
    """As write_json, unless the file exists. Returns whether this process wrote it."""
    temporary = temporary_name(file)
    write_json(temporary, value)
    try:
        os.link(temporary, file)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        return _claim_file(file) and _move_claimed(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _claim_file(file: Path) -> bool:
    """Claim the right to write the file. Of several processes at once, one gets it."""
    deadline = time.monotonic() + CLAIM_SECONDS
    while not file.exists():
        try:
            _claim(file).touch(exist_ok=False)
        except FileExistsError:
            if time.monotonic() > deadline:  # left behind by a process that was killed
                return True
            time.sleep(0.05)
        else:
            return True
    return False


def _move_claimed(temporary: Path, file: Path) -> bool:
    """Move it there, unless another process did so before this one had its claim."""
    try:
        if file.exists():
            return False
        os.replace(temporary, file)
        return True
    finally:
        _claim(file).unlink(missing_ok=True)


def _claim(file: Path) -> Path:
    return file.with_name(f"{file.name}.claim")


def ensure_writable(directory: Path) -> None:
    """Create a folder and test that it can be written, before work begins. Raises UserError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = temporary_name(directory / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from None


def remove_stale_files(directory: Path) -> None:
    """Remove temporary files of processes of this machine that have died."""
    for file in directory.glob(f"*.{socket.gethostname()}-*.tmp"):
        process = file.name.rsplit("-", 1)[1].removesuffix(".tmp")
        if process.isdecimal() and not _alive(int(process)):
            file.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
