"""Inspect and manage the checkpoints of a run. Needs no GPU and no launcher.

  python tools/checkpoint.py list runs/mnist                   samples, ranks and size of each
  python tools/checkpoint.py show runs/mnist                   the newest: progress, layout, tensors
  python tools/checkpoint.py verify runs/mnist                 check all files against checksums
  python tools/checkpoint.py diff runs/mnist/step-00001000 runs/other     tensor by tensor
  python tools/checkpoint.py prune runs/mnist --keep-last 3    delete all but the last three
  python tools/checkpoint.py ema runs/mnist --std 0.15 --out runs/mnist/average
                                                               reconstruct an EMA of another length

Commands that take a checkpoint also take a run's folder and use its newest complete checkpoint;
verify also takes an exported model.
COMMAND --help describes each command.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.checkpoints import checksums, folder, lifecycle, run_file
from diffmoe.errors import UserError, run_command

if TYPE_CHECKING:
    from diffmoe.checkpoints.inspect import Difference, StoredCheckpoint

EXIT_DIFFERENT = 1

SHOW = """One line per parameter: its global shape (of all experts, where it is theirs), and the
2-norm of each tensor stored for it: weights, Adam's moments exp_avg and exp_avg_sq or Muon's
momentum, the averages ema (constant decay) and ema-STD (power function). A norm of nan or inf means
that the tensor is not finite."""
VERIFY = """Compares the size and SHA-256 of every file with checksums.json. Exit code 2 if anything
is wrong. Given a run's folder, checks all of its checkpoints."""
DIFF = """A and B may come from different numbers of ranks, expert parallelism and ZeRO stages:
tensors are compared by their global names. Prints progress and layout of both, then each tensor
that differs: how many elements, the largest difference, and the norm of the difference relative
to A's. Exit code 0 if all tensors are bit-identical (NaN equals NaN), 1 if not."""
PRUNE = """Keeps the newest N complete checkpoints and, with --keep-samples M, the first one at or
after every multiple of M samples. Never deletes the last complete checkpoint, incomplete ones, EMA
snapshots, or a checkpoint that a process is reading. Deletes abandoned-* checkpoints once N
complete ones of their step or later exist."""
EMA = """Needs a run with training.ema_stds=[0.05,0.1] and as many checkpoints or EMA-only snapshots
as possible (training.snapshot_samples, with snapshot_precision=fp32: bf16 rounds weights by up to
0.4 %, which can exceed the effect of another length). STD is the relative length of EDM2
(arXiv 2312.02696), the standard deviation of the average's profile relative to the steps so far.
The result is the best linear combination of the stored averages. The error printed is that of
its profile, relative to the wanted profile; below 0.01 the result is nearly the same as an
average tracked during training. Lengths between the stored ones come out best. Sample from it
with: python tools/sample.py DIR"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, description: str | None = None) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=description or help)

    run_help = "a run's folder, or a checkpoint step-XXXXXXXX or ema-XXXXXXXX in it"
    listing = command("list", "list a run's checkpoints and EMA snapshots")
    listing.add_argument("run", metavar="RUN", help="a run's folder")
    show = command("show", "progress, layout, shapes and norms of the tensors", SHOW)
    show.add_argument("run", metavar="RUN", help=run_help)
    verify = command("verify", "check every file against its checksum", VERIFY)
    verify.add_argument("run", metavar="RUN", help=f"{run_help}, or an exported model")
    diff = command("diff", "compare two checkpoints tensor by tensor", DIFF)
    diff.add_argument("a", metavar="A", help=run_help)
    diff.add_argument("b", metavar="B", help=run_help)
    prune = command("prune", "delete old checkpoints", PRUNE)
    prune.add_argument("run", metavar="RUN", help="a run's folder")
    prune.add_argument(
        "--keep-last", type=int, required=True, metavar="N", help="complete checkpoints to keep"
    )
    prune.add_argument(
        "--keep-samples", type=int, metavar="M", help="also keep one every so many samples"
    )
    ema = command("ema", "reconstruct an EMA of another length", EMA)
    ema.add_argument("run", metavar="RUN", help="a run's folder")
    ema.add_argument("--std", type=float, required=True, help="relative length, e.g. 0.10")
    ema.add_argument("--step", type=int, help="a step that was stored; default the newest")
    ema.add_argument("--out", required=True, metavar="DIR", help="folder of the snapshot to write")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from diffmoe.checkpoints.inspect import open_checkpoint
    from diffmoe.checkpoints.posthoc import reconstruct_ema

    if options.command == "list":
        list_run(Path(options.run))
    elif options.command == "show":
        with open_checkpoint(folder.find_complete(options.run)) as checkpoint:
            print_tensors(checkpoint)
    elif options.command == "verify":
        verify_run(Path(options.run))
    elif options.command == "diff":
        a, b = folder.find_complete(options.a), folder.find_complete(options.b)
        with open_checkpoint(a) as first, open_checkpoint(b) as second:
            print_diff(first, second)
    elif options.command == "prune":
        prune_run(Path(options.run), options.keep_last, options.keep_samples)
    else:
        done = reconstruct_ema(Path(options.run), options.std, Path(options.out), options.step)
        print(
            f"{done.path}: length {options.std:g} at step {done.step} from {done.snapshots} "
            f"snapshots, error of the profile {done.error:.2g}\n"
            f"next: python tools/sample.py {done.path}"
        )


def list_run(run: Path) -> None:
    for path in folder.checkpoints_of(run):
        problems = checksums.wrong_sizes(path)
        if problems:
            print(f"{path.name}  not complete: {problems[0]}")
            continue
        try:
            record = run_file.read_run_file(path)
        except UserError as error:
            print(f"{path.name}  {error}")
            continue
        size = sum(file.stat().st_size for file in path.iterdir())
        print(
            f"{path.name}  {record.clock.samples:>12,} samples  "
            f"{record.saved_by.world:>4} ranks  {size / 1e6:>10,.1f} MB"
        )


def print_tensors(checkpoint: StoredCheckpoint) -> None:
    print(f"{checkpoint.path}\n{_layout(checkpoint)}")
    prefixes = checkpoint.prefixes
    shapes = {name.partition("/")[2]: shape for name, shape in checkpoint.shapes.items()}
    width = max(map(len, shapes))
    print(f"{'':{width}} {'shape':>14}" + "".join(f"{prefix:>12}" for prefix in prefixes))
    for name, shape in shapes.items():
        keys = [f"{prefix}/{name}" for prefix in prefixes]
        norms = [
            f"{checkpoint.read(key).double().norm():.5g}" if key in checkpoint.shapes else ""
            for key in keys
        ]
        line = f"{name:{width}} {'x'.join(map(str, shape)):>14}"
        print((line + "".join(f"{norm:>12}" for norm in norms)).rstrip())


def _layout(checkpoint: StoredCheckpoint) -> str:
    clock, parallel = checkpoint.record.clock, checkpoint.config.parallel
    return (
        f"samples {clock.samples:,}, step {clock.step}, skipped {clock.skipped}\n"
        f"saved by {checkpoint.record.saved_by.world} ranks, expert_parallel "
        f"{parallel.expert_parallel}, zero_stage {parallel.zero_stage}: "
        f"{len(checkpoint.shapes)} tensors in {sum(checkpoint.pieces.values())} pieces"
    )


def verify_run(path: Path) -> None:
    from diffmoe.export.exported_model import ExportedModel, is_exported

    if is_exported(path):
        print(f"{path}  intact, {ExportedModel(path).verify()} files")
        return
    parts = (run_file.FILE_NAME, checksums.FILE_NAME)
    is_checkpoint = any((path / part).exists() for part in parts)
    problems = []
    for checkpoint in [path] if is_checkpoint else folder.checkpoints_of(path):
        found = checksums.find_damage(checkpoint)
        problems += found
        print(f"{checkpoint}  {'DAMAGED' if found else 'intact'}")
    if problems:
        raise UserError("\n  ".join([f"{len(problems)} problems:", *problems]))


def prune_run(run: Path, keep_last: int, keep_samples: int | None) -> None:
    if keep_last < 1:
        raise UserError(f"--keep-last {keep_last}: keep at least 1, the newest")
    if keep_samples is not None and keep_samples < 1:
        raise UserError(f"--keep-samples {keep_samples}: give a number of samples, such as 1000000")
    folder.checkpoints_of(run)  # raises UserError if there are none
    gone = lifecycle.prune(run, keep_last, keep_samples)
    print(f"deleted {', '.join(gone) or 'nothing'}; kept {', '.join(folder.names(run))}")


def print_diff(first: StoredCheckpoint, second: StoredCheckpoint) -> None:
    from diffmoe.checkpoints.inspect import compare

    for letter, checkpoint in (("A", first), ("B", second)):
        print(f"{letter}: {checkpoint.path}\n{_layout(checkpoint)}")
    equal, different = 0, 0
    for difference in compare(first, second):
        if difference.problem is None and not difference.differing:
            equal += 1
            continue
        different += 1
        print(_describe(difference))
    print(f"{equal} tensors are equal, {different} differ")
    if different:
        sys.exit(EXIT_DIFFERENT)


def _describe(difference: Difference) -> str:
    if difference.problem is not None:
        return f"  {difference.name}: {difference.problem}"
    return (
        f"  {difference.name}: {difference.differing} of {difference.size} elements, at most "
        f"{difference.largest:.3g}, relative {difference.relative:.3g}"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `show RUN | head` ends without a traceback
    run_command(main)
