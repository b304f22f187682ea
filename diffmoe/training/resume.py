"""Which checkpoint a run goes on from, and whether its configuration may be gone on with."""

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from diffmoe.checkpoints import checksums, folder, lifecycle
from diffmoe.checkpoints.run_file import Origin, RunFile, read_run_file
from diffmoe.config import Config
from diffmoe.data.manifest import Manifest
from diffmoe.errors import UserError
from diffmoe.files import sha256_of, write_atomically
from diffmoe.parallel.agree import from_first_rank
from diffmoe.training.due import missed
from diffmoe.training.schedule import end_matters_from

# The network as a function: another one is another run.
_SHAPE = (
    "model",
    "moe.type",
    "moe.experts",
    "moe.every_block",
    "moe.activation",
    "moe.expert_ratio",
    "moe.shared_expert_ratio",
    "moe.shared_expert_activation",
    # Of the projector beside it.
    "align.block",
    "align.projector",
    "align.width",
    "align.hidden",
    "lora",
)
# Where it runs and what it tells; the numbers stay (to rounding, on another layout).
_HARMLESS = (
    "data.path",
    "data.workers",
    "data.max_bad_shards",
    "data.stall_seconds",
    "data.cache",
    "data.cache_gib",
    "moe.inference",
    "training.checkpoint_samples",
    "training.keep_last",
    "training.keep_samples",
    "training.snapshot_samples",
    "training.snapshot_precision",
    "training.save_failure",
    "training.activation_checkpointing",
    "training.compile",
    "training.deterministic",
    "training.evaluate_every",
    "training.validate_every",
    "evaluation",
    "validation",
    "training.init",  # a start is behind a run that goes on
    "parallel",
    "logging",
)
# They alter nothing before the learning rate begins to fall.
_END = ("training.total_samples", "optimizer.schedule", "optimizer.decay_samples")
# What else an allowed change alters.
_ANEW = "; the optimizer's state starts anew"
_ALSO = dict.fromkeys(("optimizer.type", "training.freeze", "training.train_only"), _ANEW)


class Resume(NamedTuple):
    """checkpoint: to go on from; None starts afresh. notes: what to tell about it.

    aside: later checkpoints and snapshots of the output, which an older PATH abandons. origin: the
    PATH that this output once began from, and its checkpoint's checksum, handed on from checkpoint
    to checkpoint. missed: of ema and evaluation, what was due at this clock and was never done.
    """

    checkpoint: Path | None
    notes: list[str]
    aside: tuple[Path, ...] = ()
    origin: Origin | None = None
    missed: frozenset[str] = frozenset()


def find_checkpoint(config: Config, resume: str, allowed: list[str] | None = None) -> Resume:
    """What to go on from; the same answer on every rank.

    resume: `auto` takes the output's newest whole checkpoint and starts afresh where there is
        none at all; `none` starts only where there is none; a PATH must be whole. Of an output that
        was already trained on from that PATH, as by a job that was preempted, its newest one.
    allowed: fields in which the configuration may differ although that alters the run.
    Raises UserError where something is there but nothing whole.
    """
    output = Path(config.output)
    here, leftovers, copies = from_first_rank(
        (folder.names(output), folder.leftovers(output), folder.copies(output))
    )
    notes = [f"{path} is left over from an interrupted save; it is removed" for path in leftovers]
    notes += [
        f"{path} is no checkpoint of this run's, by its name or its clock, and is left alone; "
        "--resume takes it by its PATH"
        for path in copies
    ]
    if resume == "none" and here:
        raise UserError(
            f"--resume none, but output={config.output} holds {here[-1]}; choose another output"
        )
    if resume == "none" or (resume == "auto" and not here):
        return Resume(None, notes)
    aside: list[Path] = []
    path = Path(resume)
    going_on = here and (resume == "auto" or _same_place(path, output))
    if not going_on and from_first_rank(_trained_on(path, output, here, config)):
        going_on = True
        notes.append(f"{output} has already been trained on from {path}, and goes on")
    if going_on:
        checkpoint, passed_over = _newest_whole(output, here)
        origin = read_run_file(checkpoint).origin
    else:
        checkpoint, passed_over = _named(path, output, here)
        origin = Origin(path=os.path.realpath(path), sha256=_identity(checkpoint))
        if checkpoint.parent == output:
            aside = from_first_rank(folder.later_than(checkpoint))
    notes += passed_over + check_configuration(checkpoint, config, allowed or [])
    notes += [f"{path} is set aside as abandoned-{path.name}" for path in aside]
    own = checkpoint.parent == output
    missed_here = from_first_rank(missed(config, checkpoint)) if own else ()
    return Resume(checkpoint, notes, tuple(aside), origin, frozenset(missed_here))


def _trained_on(path: Path, output: Path, here: list[str], config: Config) -> bool:
    """Whether the output's newest checkpoint comes from PATH by way of this very configuration.

    PATH may be gone by now, or be a run that has newer ones. With another configuration PATH is
    meant to be begun from once more.
    """
    whole = (output / name for name in reversed(here) if not checksums.wrong_sizes(output / name))
    newest = next(whole, None)
    try:
        origin = read_run_file(newest).origin if newest else None
        if newest is None or origin is None:
            return False
        if folder.is_checkpoint(path):
            belongs = origin.sha256 == _identity(path)
        else:
            belongs = origin.path == os.path.realpath(path)
        check_configuration(newest, config, [])
    except UserError:  # damaged, or of another configuration
        return False
    return belongs


def _identity(checkpoint: Path) -> str:
    try:
        return sha256_of(checkpoint / checksums.FILE_NAME)
    except OSError as error:
        raise UserError(f"{checkpoint} cannot be read: {error.strerror}") from None


def _same_place(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def make_way(config: Config, resume: Resume) -> None:
    """Remove what kills left, and take what is abandoned out of the sequence.

    For rank 0, once every rank has looked; it tells the notes. Raises UserError where the folder
    cannot be written.
    """
    output = Path(config.output)
    try:
        for path in folder.leftovers(output):
            lifecycle.remove(path)
        for path in resume.aside:
            lifecycle.set_aside(path)
        if resume.checkpoint is not None and resume.checkpoint.parent == output:
            # A kill may have come before it was written.
            write_atomically(output / "latest", resume.checkpoint.name)
        write_atomically(output / "config.yaml", config.to_yaml())
    except OSError as error:
        raise UserError(
            f"output={output} cannot be written: {error.strerror} ({error.filename}); "
            "choose another output"
        ) from None
    for note in resume.notes:
        print(f"warning: {note}" if "passed over" in note else note, file=sys.stderr, flush=True)


def _newest_whole(run: Path, found: list[str]) -> tuple[Path, list[str]]:
    notes: list[str] = []
    for name in reversed(found):
        problems = _verified_together(run / name)
        if not problems:
            return run / name, notes
        notes.append(f"{run / name} is passed over: {problems[0]}")
    raise UserError(
        f"{run} holds no whole checkpoint:\n  "
        + "\n  ".join(notes)
        + "\nchoose another output to start afresh"
    )


def _named(path: Path, output: Path, here: list[str]) -> tuple[Path, list[str]]:
    passed_over: list[str] = []
    if not folder.is_checkpoint(path) and folder.names(path):
        path, passed_over = _newest_whole(path, from_first_rank(folder.names(path)))
    else:
        path = folder.find_complete(path)
        if path.name.startswith("ema-"):
            raise UserError(f"{path} holds the EMA alone: sample from it; resume a step-XXXXXXXX")
        problems = _verified_together(path)
        if problems:
            raise UserError(f"{problems[0]}; take an older checkpoint")
    if _same_place(path.parent, output):
        path = output / path.name
    elif here:
        raise UserError(
            f"--resume {path} would continue in output={output}, which holds {here[-1]} of its "
            "own; choose another output"
        )
    return path, passed_over


def check_configuration(checkpoint: Path, config: Config, allowed: list[str]) -> list[str]:
    """Hold the configuration against the checkpoint's, field by field.

    Returns what differs and is taken; raises UserError with all that is refused.
    """
    record = read_run_file(checkpoint)
    there, now = dotted(record.config), dotted(config.model_dump(mode="json"))
    defaults = dotted(Config().model_dump(mode="json"))
    known = defaults.keys() | there.keys()
    unknown = [field for field in allowed if field not in known]
    if unknown:
        raise UserError(f"--allow-changed {unknown[0]}: there is no such field")
    taken, shape, refused = [], [], []
    free_until = min(end_matters_from(defaults | there), end_matters_from(now))
    for field in sorted(there.keys() | now.keys()):
        # A field that the checkpoint's version did not have was at its default.
        old, new = there.get(field, defaults.get(field)), now.get(field)
        if field == "optimizer.weight_decay" and old and new and _decays_all(record):
            old, new = f"{old} of all parameters", f"{new} of matrices alone"
        if old == new or field == "output":
            continue
        if field == "model.rope_grid" and new is None:  # which leaves it as it is there
            continue
        line = f"{field}: {old} there, {new} now"
        if _within(field, _SHAPE):
            shape.append(line)
        elif (field in _END and record.clock.samples <= free_until) or _within(field, _HARMLESS):
            taken.append(line)
        elif field in allowed:
            taken.append(line + _ALSO.get(field, ""))
        else:
            refused.append(line)
    if config.data.path is not None and record.shards_sha256 is not None:
        manifest = Manifest.load(config.data.path)
        if manifest.shards_sha256 != record.shards_sha256:
            line = f"data.path: {config.data.path} holds other shards than the run was trained on"
            (taken if "data.path" in allowed else refused).append(line)
    if shape:
        raise UserError(_refusal(checkpoint, "another network", shape, "choose another output"))
    if refused:
        flags = " ".join(f"--allow-changed {line.split(':')[0]}" for line in refused)
        raise UserError(
            _refusal(
                checkpoint,
                "a run of another configuration",
                refused,
                f"take its values, or {flags} to alter the run from here on",
            )
        )
    return [f"changed since {checkpoint.name}: {line}" for line in taken] + _other_pools(
        record, config
    )


def _decays_all(record: RunFile) -> bool:
    """Whether the checkpoint's version decayed biases, norms, embeddings and routers, too."""
    return "rate_multipliers" not in record.config.get("optimizer", {})


def _other_pools(record: RunFile, config: Config) -> list[str]:
    """A pool narrower than all ranks holds other tokens on another layout."""
    scope = config.moe.token_pool
    before: float = record.saved_by.world
    now: float = dist.get_world_size() if dist.is_initialized() else 1
    if scope == "expert_parallel":
        before /= record.settings.parallel.expert_parallel
        now /= config.parallel.expert_parallel
    if config.moe.type not in ("diffmoe", "race") or scope == "global" or before == now:
        return []
    return [
        f"experts choose from another pool than before: {now:g} pools a micro-batch instead of "
        f"{before:g}, with moe.token_pool={scope}; equal numbers on any layout need `global`"
    ]


def _refusal(checkpoint: Path, of: str, lines: list[str], way_out: str) -> str:
    return f"{checkpoint} is of {of}:\n  " + "\n  ".join(lines) + f"\n{way_out}"


def _within(field: str, keys: tuple[str, ...]) -> bool:
    return any(field == key or field.startswith(key + ".") for key in keys)


def dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one table: {"a": {"b": 1}} is {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _verified_together(checkpoint: Path) -> list[str]:
    """`find_damage`, the hashing shared among the ranks."""
    if not dist.is_initialized():
        return checksums.find_damage(checkpoint)
    rank, world = dist.get_rank(), dist.get_world_size()
    everyone: list = [None] * world
    dist.all_gather_object(everyone, checksums.find_damage(checkpoint, rank, world))
    return sorted({problem for problems in everyone for problem in problems})
