"""Look at the checkpoints of a run, on any machine: no process group, no GPU.

  python tools/checkpoint.py list runs/mnist                   all of them: clock, ranks, size
  python tools/checkpoint.py show runs/mnist                   the newest: clock, layout, tensors
  python tools/checkpoint.py verify runs/mnist                 all files against their checksums
  python tools/checkpoint.py diff runs/mnist/step-00001000 runs/other     tensor by tensor
  python tools/checkpoint.py prune runs/mnist --keep-last 3    delete all but the last three
  python tools/checkpoint.py ema runs/mnist --std 0.15 --out runs/mnist/average
                                                               an average of another length

Where a checkpoint is asked for, a run's folder means its newest complete one. COMMAND --help says
more of each.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.checkpoints import folder
from diffmoe.errors import UserError, run_command

if TYPE_CHECKING:
    from diffmoe.checkpoints.inspect import Difference, StoredCheckpoint

EXIT_DIFFERENT = 1

SHOW = """One line per parameter: its global shape, experts included, and the 2-norm of each tensor
stored for it: weights, Adam's moments exp_avg and exp_avg_sq, averages ema (constant decay) and
ema-STD (power function). A norm of nan or inf says that the tensor is not finite."""
VERIFY = """Sizes, then the SHA-256 of every file, against checksums.json. Exit code 2 if anything
is wrong. Given a run's folder, all of its checkpoints are looked at."""
DIFF = """The two may come from different numbers of ranks, expert parallelism and ZeRO stages:
tensors are compared by their global names. Prints the clock and layout of both, then each tensor
that differs: how many elements, by how much at most, and the norm of the difference relative
to A's. Exit code 0 if all tensors are equal bit for bit (NaN equals NaN), 1 if not."""
PRUNE = """Keeps the newest N complete checkpoints and, with --keep-samples M, the first one at or
after every multiple of M samples. At least one complete checkpoint stays, incomplete ones are left
alone, and so is one that a process is reading. EMA-only snapshots are left alone. What was set
aside as abandoned-* goes once N checkpoints of its step or later are there."""
EMA = """Needs a run with training.ema_stds=[0.05,0.1] and as many checkpoints or EMA-only snapshots
as possible (training.snapshot_samples; with snapshot_precision=fp32, because bf16 rounds weights by
up to 0.4 %, which can be more than another length changes). The average of length STD (of EDM2,
arXiv 2312.02696: the standard deviation of its profile relative to the steps so far; longer
averages more) is the best combination of all that are stored. The error printed is that of the
combined profile, relative to the wanted one: below 0.01 hardly differs from having tracked it;
lengths between the stored ones come out best. Sample from it with: python tools/sample.py DIR"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, description: str | None = None) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=description or help)

    run_help = "a run's folder, or a checkpoint step-XXXXXXXX or ema-XXXXXXXX in it"
    listing = command("list", "list a run's checkpoints and EMA-only snapshots")
    listing.add_argument("run", metavar="RUN", help="a run's folder")
    show = command("show", "clock, layout, tensors with shapes and norms", SHOW)
    show.add_argument("run", metavar="RUN", help=run_help)
    verify = command("verify", "hold every file against its checksum", VERIFY)
    verify.add_argument("run", metavar="RUN", help=run_help)
    diff = command("diff", "compare two checkpoints tensor by tensor", DIFF)
    diff.add_argument("a", metavar="A", help=run_help)
    diff.add_argument("b", metavar="B", help=run_help)
    prune = command("prune", "delete old checkpoints", PRUNE)
    prune.add_argument("run", metavar="RUN", help="a run's folder")
    prune.add_argument("--keep-last", type=int, required=True, metavar="N")
    prune.add_argument("--keep-samples", type=int, metavar="M")
    ema = command("ema", "reconstruct an average of another length", EMA)
    ema.add_argument("run", metavar="RUN", help="a run's folder")
    ema.add_argument("--std", type=float, required=True, help="relative length, e.g. 0.10")
    ema.add_argument("--step", type=int, help="at this stored step; default the newest")
    ema.add_argument("--out", required=True, metavar="DIR", help="the snapshot to write")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from diffmoe.checkpoints.inspect import open_checkpoint
    from diffmoe.checkpoints.posthoc import reconstruct_ema

    if options.command == "list":
        list_run(Path(options.run))
    elif options.command == "show":
        with open_checkpoint(folder.complete(options.run)) as checkpoint:
            show(checkpoint)
    elif options.command == "verify":
        verify(Path(options.run))
    elif options.command == "diff":
        a, b = folder.complete(options.a), folder.complete(options.b)
        with open_checkpoint(a) as first, open_checkpoint(b) as second:
            diff(first, second)
    elif options.command == "prune":
        prune(Path(options.run), options.keep_last, options.keep_samples)
    else:
        done = reconstruct_ema(Path(options.run), options.std, Path(options.out), options.step)
        print(
            f"{done.path}: length {options.std:g} at step {done.step} from {done.snapshots} "
            f"snapshots, error of the profile {done.error:.2g}\n"
            f"next: python tools/sample.py {done.path}"
        )


def list_run(run: Path) -> None:
    from diffmoe.checkpoints.inspect import checkpoints

    for path in checkpoints(run):
        problems = folder.wrong_sizes(path)
        if problems:
            print(f"{path.name}  not complete: {problems[0]}")
            continue
        try:
            about = folder.read_about(path)
        except UserError as error:
            print(f"{path.name}  {error}")
            continue
        size = sum(file.stat().st_size for file in path.iterdir())
        print(
            f"{path.name}  {about['clock']['samples']:>12,} samples  "
            f"{about['saved_by']['world']:>4} ranks  {size / 1e6:>10,.1f} MB"
        )


def show(checkpoint: StoredCheckpoint) -> None:
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
    clock, parallel = checkpoint.about["clock"], checkpoint.config.parallel
    return (
        f"samples {clock['samples']:,}, step {clock['step']}, skipped {clock['skipped']}\n"
        f"saved by {checkpoint.about['saved_by']['world']} ranks, expert_parallel "
        f"{parallel.expert_parallel}, zero_stage {parallel.zero_stage}: "
        f"{len(checkpoint.shapes)} tensors in {sum(checkpoint.pieces.values())} pieces"
    )


def verify(path: Path) -> None:
    from diffmoe.checkpoints.inspect import checkpoints

    is_checkpoint = (path / folder.ABOUT).exists() or (path / folder.CHECKSUMS).exists()
    paths = [path] if is_checkpoint else checkpoints(path)
    problems = []
    for checkpoint in paths:
        found = folder.verify(checkpoint)
        problems += found
        print(f"{checkpoint}  {'DAMAGED' if found else 'whole'}")
    if problems:
        raise UserError("\n  ".join([f"{len(problems)} problems:", *problems]))


def prune(run: Path, keep_last: int, keep_samples: int | None) -> None:
    from diffmoe.checkpoints.inspect import checkpoints

    if keep_last < 1:
        raise UserError(f"--keep-last {keep_last}: at least 1, the newest, stays")
    if keep_samples is not None and keep_samples < 1:
        raise UserError(f"--keep-samples {keep_samples}: give a number of samples, such as 1000000")
    checkpoints(run)  # tells a folder without any
    gone = folder.prune(run, keep_last, keep_samples)
    print(f"deleted {', '.join(gone) or 'nothing'}; kept {', '.join(folder.names(run))}")


def diff(first: StoredCheckpoint, second: StoredCheckpoint) -> None:
    from diffmoe.checkpoints.inspect import compare

    for letter, checkpoint in (("A", first), ("B", second)):
        print(f"{letter}: {checkpoint.path}\n{_layout(checkpoint)}")
    equal, different = 0, 0
    for difference in compare(first, second):
        if difference.problem is None and not difference.differing:
            equal += 1
            continue
        different += 1
        print(_told(difference))
    print(f"{equal} tensors are equal, {different} differ")
    if different:
        sys.exit(EXIT_DIFFERENT)


def _told(difference: Difference) -> str:
    if difference.problem is not None:
        return f"  {difference.name}: {difference.problem}"
    return (
        f"  {difference.name}: {difference.differing} of {difference.size} elements, at most "
        f"{difference.largest:.3g}, relative {difference.relative:.3g}"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `show RUN | head` ends without a traceback
    run_command(main)
