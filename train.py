"""Train a DiffMoE.

  python train.py --config mnist                                   one process
  torchrun --nproc_per_node 2 train.py --config mnist parallel.expert_parallel=2
  deepspeed train.py --config diffmoe_l_e16_flow --ds_config deepspeed_configs/zero1_bf16.json \\
      data.path=/data/imagenet256

Settings are written section.key=value after the options; --help-settings explains all of them,
--print-config shows a recipe's values. A run
lives in its `output` folder (runs/RECIPE): checkpoints, metrics.jsonl, config.yaml. Running the
same command again resumes from the newest complete checkpoint, on any number of ranks that the
lanes allow; while it runs, a second one in the same output is refused. Ctrl-C, SIGTERM, SIGUSR1 or
SIGHUP to any rank, or the end of its launcher, finishes the step, saves and exits with code 85; a
second Ctrl-C ends at once, with code 130. Other codes: 0 finished, 2 a wrong setting, file or
folder, 1 a failure.

Signalled themselves, torchrun gives its ranks 30 seconds for that, or --shutdown-timeout, and
deepspeed 30 after Ctrl-C. A save that takes longer is cut, and the previous checkpoint stays:
signal a rank instead, which has all the time it needs. SIGUSR2 prints the stacks of all threads of
a rank.
"""

import argparse
import os
import signal
import sys
import time
import traceback
from typing import Any, NoReturn

STOPPED = "stopped before the training began; nothing was changed"


def stop_at_once(*_: object) -> None:
    """Ctrl-C while libraries are imported: an exception there can turn into any other."""
    if os.environ.get("RANK", "0") == "0":
        os.write(sys.stderr.fileno(), f"{STOPPED}\n".encode())
    os._exit(130)


# A background job ignores it, and goes on doing so.
interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if interruptible:
    signal.signal(signal.SIGINT, stop_at_once)

from diffmoe.errors import EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER_ERROR  # noqa: E402

PATIENCE = 10.0  # seconds for a machine's first rank to report a wrong setting


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a recipe's name or a YAML file")
    parser.add_argument("--ds_config", help="DeepSpeed JSON, e.g. deepspeed_configs/zero1.json")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|PATH",
        help="auto (default): resume the output's newest complete checkpoint, if there is one; "
        "none: only start in an empty output; PATH: a checkpoint or a run's folder, which must be "
        "there; later checkpoints in the output are set aside as abandoned-*. Given again, as by a "
        "requeued job, it resumes from what the output has saved since",
    )
    parser.add_argument(
        "--allow-changed",
        action="append",
        metavar="FIELD",
        help="resume although this setting differs from the checkpoint's and alters the run",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is one"
    )
    parser.add_argument(
        "--help-settings",
        nargs="?",
        action=HelpSettings,
        metavar="SECTION",
        help="explain all settings, or those of a section such as optimizer, then stop",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="show and explain the settings as YAML, then stop",
    )
    # Launchers hand it over; the environment's LOCAL_RANK is what counts.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    # Settings may stand between options.
    options, unknown = parser.parse_known_intermixed_args()
    if unknown:
        from diffmoe.config import Config
        from diffmoe.config.settings import nearest_setting

        flag = unknown[0].partition("=")[0]
        near = nearest_setting(flag.lstrip("-"), Config)
        parser.error(
            f"unknown option {flag}: settings are written section.key=value"
            + (f", here {near}=..." if near else "; --help-settings explains them")
        )
    return options


class HelpSettings(argparse.Action):
    """--help-settings [SECTION]: needs no other option, as --help."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: object, *given: Any) -> None:
        from diffmoe.config import Config
        from diffmoe.errors import UserError

        try:
            section = given[0]
            print(Config().explained_section(section) if section else Config().explained(), end="")
        except UserError as error:
            parser.error(str(error))
        parser.exit()


def main() -> int:
    from diffmoe.errors import UserError, missing_extra
    from diffmoe.process import launcher
    from diffmoe.process.terminal import ignore_output_errors

    arguments = parse()
    ignore_output_errors()
    launcher.find_launchers()
    try:
        return run(arguments)
    except UserError as error:
        fail(f"error: {error}", EXIT_USER_ERROR)
    except KeyboardInterrupt:
        fail(STOPPED, EXIT_INTERRUPTED)
    except Exception as error:
        missing = missing_extra(error) if isinstance(error, ModuleNotFoundError) else None
        if missing is not None:
            fail(f"error: {missing}", EXIT_USER_ERROR)
        told = f"[rank {os.environ.get('RANK', '0')}] {traceback.format_exc()}"
        fail(told, 1, may_be_a_peer=isinstance(error, RuntimeError))


def run(arguments: argparse.Namespace) -> int:
    from diffmoe.process.scratch import use_scratch_folder
    from diffmoe.recipes import load_config

    config = load_config(arguments.config, arguments.overrides)
    use_scratch_folder(keep_compiled=config.training.compile)
    if arguments.device:
        os.environ["DS_ACCELERATOR"] = arguments.device  # read while DeepSpeed is imported
    from diffmoe.training.start import start

    if interruptible:  # ranks that join from here on are told
        signal.signal(signal.SIGINT, signal.default_int_handler)
    finished = start(
        config,
        arguments.ds_config,
        arguments.resume,
        arguments.device,
        arguments.print_config,
        arguments.allow_changed,
    )
    return 0 if finished else EXIT_STOPPED


def fail(message: str, code: int, may_be_a_peer: bool = False) -> NoReturn:
    """Tell it and leave: once for the whole run, where the ranks have joined."""
    peers = sys.modules.get("diffmoe.training.watchdog")  # loaded by what lets the ranks join
    if peers is not None:
        peers.leave(message, code, may_be_a_peer)
    # Before that, a wrong setting is told once a machine, a crash by each rank. The launcher ends
    # the others at the first exit: whoever comes before the rank that tells it waits for that.
    if code == EXIT_USER_ERROR and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE)
    print(message, file=sys.stderr, flush=True)
    from diffmoe.process.exit import end_process

    sys.stdout.flush()
    end_process(code)


if __name__ == "__main__":
    sys.exit(main())
