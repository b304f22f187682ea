"""Train several configurations times several seeds, and compare their held-out losses.

  python tools/compare.py mnist                # train what is missing, then the table
  python tools/compare.py mnist --report       # the table of what is there
  python tools/compare.py my-study.yaml

All variants of a seed see the same samples, noise and times, so their differences are paired: the
table gives the mean of variant minus reference over seeds with its 95 % interval (Student's t);
a star marks those that exclude zero. "its end at" tells after which share of the reference's
samples and seconds a variant is where the reference ends. Parameters and FLOPs are computed.
Interrupted at any time, the same command continues. The output gets table.md, table.json and
curves.png.

STUDY is mnist, captioned_digits, photographs, optimizers or alignment, of which
diffmoe/comparison/studies/ says what data they need; or a YAML file such as

  config: mnist                       # recipe or file that all variants share
  overrides: [data.path=data/digits-train, validation.path=data/digits-held-out,
              training.validate_every=6400, training.total_samples=51200]
  variants:
    dense: [moe.type=dense]
    softmax: []
    identity: [moe.gate=identity]
  reference: dense
  seeds: [0, 1, 2]
  output: runs/studies/digits
  evaluate: [--num, "1000", --classifier, digits]   # optional: of tools/evaluate.py
"""

import argparse
import sys

from diffmoe.errors import EXIT_STOPPED, run_command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", metavar="STUDY", help="a name, or a YAML file")
    parser.add_argument("--report", action="store_true", help="train nothing")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from diffmoe.comparison.measured import measured
    from diffmoe.comparison.report import write_report
    from diffmoe.comparison.running import check_runs, complete
    from diffmoe.comparison.study import read_study, runs_of

    study = read_study(options.study)
    runs = runs_of(study)
    check_runs(study, runs)
    done = options.report or complete(study, runs)
    if done or any(measured(run) for run in runs):
        print(write_report(study, runs))
    if not done:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    run_command(main)
