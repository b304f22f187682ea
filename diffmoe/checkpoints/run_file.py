"""run.json of a checkpoint: everything in it that is not a tensor."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffmoe.clock import Clock, Count
from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.files import read_text

FILE_NAME = "run.json"
_Positive = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class StoredParallel(_Part):
    expert_parallel: _Positive
    zero_stage: int


class StoredTraining(_Part):
    """Empty in files written before there were power-function averages and frozen parameters."""

    batch_size: _Positive
    ema_stds: tuple[float, ...] = ()
    freeze: tuple[str, ...] = ()
    train_only: tuple[str, ...] = ()


class StoredOptimizer(_Part):
    """type: AdamW in files written before there was another."""

    type: str = "adamw"


class StoredSettings(_Part):
    """The settings that are read whatever version of DiffMoE wrote the file."""

    parallel: StoredParallel
    training: StoredTraining
    optimizer: StoredOptimizer = StoredOptimizer()


class SavedBy(_Part):
    """world: number of ranks. The others are versions."""

    model_config = ConfigDict(extra="allow")

    world: _Positive
    torch: str | None = None
    deepspeed: str | None = None
    python: str | None = None


class Origin(_Part):
    """Where a run began with --resume PATH.

    path: absolute, without links. sha256: of the checksums.json of the checkpoint found there.
    """

    path: str
    sha256: str


class PosthocAverage(_Part):
    """Of an average that was reconstructed after training.

    std: its relative length. error: of its profile, relative. stored: names of the checkpoints and
    snapshots that it was put together from.
    """

    std: float
    error: float
    stored: tuple[str, ...] = Field(alias="from")


class RunFile(_Part):  # type: ignore[no-redef]  # pydantic's plugin adds the alias as a name
    """run.json, validated as far as its readers rely on it. Unknown fields are kept.

    optimizer_steps: those that were not skipped. config: the run's settings as
    they were written, by whatever version; `settings`: those of them that every version has.
    latents: the data's manifest without its shards: what the network's numbers stand for.
    shards_sha256: identifies the data. origin: see `Origin`; None for most runs.
    """

    model_config = ConfigDict(extra="allow")

    clock: Clock
    optimizer_steps: Count
    config: dict[str, Any]
    settings: StoredSettings = Field(validation_alias="config", exclude=True)
    latents: dict[str, Any]
    shards_sha256: str | None = None
    saved_by: SavedBy
    origin: Origin | None = None
    reconstructed: PosthocAverage | None = None

    def json_text(self) -> str:
        """The text of the file. Fields that were never set are left out."""
        return json.dumps(self.model_dump(exclude_unset=True, by_alias=True), indent=1)


def read_run_file(checkpoint: Path) -> RunFile:
    """run.json of a checkpoint. Raises UserError naming the file and what is wrong with it."""
    file = checkpoint / FILE_NAME
    older = "take an older checkpoint by its PATH, step-XXXXXXXX"
    try:
        values = json.loads(read_text(file))
        missing = {"clock", "optimizer_steps", "config", "latents"} - set(values)
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return RunFile.model_validate(values)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; {older}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        reason = f"{field}={problem['input']!r:.40}: {problem['msg']}"
        raise UserError(f"{file} is damaged ({reason}); {older}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); {older}") from None


def stored_config(checkpoint: Path, settings: dict[str, Any]) -> Config:
    """`RunFile.config` as a configuration of this version.

    Never with the permission to run commands, whatever the file says. Raises UserError for settings
    that this version does not know.
    """
    try:
        return Config.model_validate(settings).replace({"data.allow_commands": False})
    except ValidationError as error:
        file = checkpoint / FILE_NAME
        raise UserError(f"{file} holds a configuration of another version: {error}") from None
