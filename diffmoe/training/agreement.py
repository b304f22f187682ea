"""Before any work the ranks compare what they were started with, and the files that they see.

Another seed or learning rate on one rank would train on in silence, another depth would hang, and
a node whose view of a shared folder lags would take another checkpoint.
"""

import hashlib
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch.distributed as dist

import diffmoe
from diffmoe.checkpoints import checksums, folder
from diffmoe.config import Config
from diffmoe.data.manifest import Manifest
from diffmoe.errors import UserError
from diffmoe.files import sha256_of
from diffmoe.parallel.agree import disagreements
from diffmoe.training.resume import dotted

# Places and readers of one machine: what is read from them is compared instead.
_OWN = ("data.path", "data.cache", "data.cache_gib", "data.workers")
_PACKAGES = (
    "torch",
    "deepspeed",
    "megatron-core",
    "webdataset",
    "numpy",
    "pydantic",
    "safetensors",
)
CODE = Path(diffmoe.__file__).parent
LAG = 75.0  # seconds in which a shared folder shows all nodes the same; NFS keeps a listing for 60


def check_settings(config: Config, ds_settings: dict[str, Any], options: dict[str, Any]) -> None:
    """Raise UserError unless all ranks have the same settings, code and packages.

    options: of the command, by name.
    """
    settings = dotted(config.model_dump(mode="json"))
    values = {name: value for name, value in settings.items() if name not in _OWN}
    values |= dotted(ds_settings, "ds_config: ") | options | _versions() | _code()
    lines = disagreements(values)
    if lines:
        raise UserError(
            "the ranks were started differently:\n  "
            + "\n  ".join(lines)
            + "\nstart all of them by the same command, with the same code and packages"
        )


def check_folders(config: Config, resume: str) -> None:
    """Raise UserError unless all ranks see the same data and checkpoints, at the latest after LAG.

    resume: auto, none, or a path.
    """
    deadline, told = time.monotonic() + LAG, False
    while lines := disagreements(_seen(config, resume)):
        # Rank 0's clock: all must look equally often.
        late = [time.monotonic() > deadline]
        dist.broadcast_object_list(late, src=0)
        seen = "the ranks see different files:\n  " + "\n  ".join(lines)
        if late[0]:
            raise UserError(
                f"{seen}\nafter {LAG:g} s; does every node mount the same folders, and is the data "
                "the same on each?"
            )
        if not told and dist.get_rank() == 0:
            print(f"{seen}\nlooking again for up to {LAG:g} s", file=sys.stderr, flush=True)
        told = True
        time.sleep(LAG / 75)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # put there without pip
            found[name] = "unknown"
    return found


def _code() -> dict[str, str]:
    """The first digits of every source file's SHA-256."""
    return {
        f"code of diffmoe/{path.relative_to(CODE)}": sha256_of(path)[:12]
        for path in sorted(CODE.rglob("*.py"))
    }


def _seen(config: Config, resume: str) -> dict[str, Any]:
    """What a start reads from shared folders, by its name in the message."""
    seen: dict[str, Any] = {f"checkpoints in {config.output}": folder.names(Path(config.output))}
    if config.data.path is not None:
        seen["manifest of the data (SHA-256)"] = _manifest(config.data.path)
    if resume not in ("auto", "none"):
        path = Path(resume)
        seen[f"--resume {resume}"] = [_hash(path / checksums.FILE_NAME), folder.names(path)]
    if config.training.init is not None:
        seen["training.init (SHA-256)"] = _hash(Path(config.training.init) / "config.json")
    if config.evaluation.prompts is not None:
        seen["evaluation.prompts (SHA-256)"] = _hash(Path(config.evaluation.prompts))
    return seen


def _manifest(directory: str) -> str:
    """Stands for the data wherever its files lie."""
    try:
        manifest = Manifest.load(directory)
    except (UserError, OSError):  # told by the checks, if all ranks have it
        return "unreadable"
    text = manifest.model_dump_json(exclude={"location"})
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _hash(path: Path) -> str:
    try:
        return sha256_of(path)[:12]
    except OSError:
        return "unreadable"
