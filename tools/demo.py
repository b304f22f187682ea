"""Try a model in the browser: class or caption, seed, guidance, and how much it computes.

  python tools/demo.py runs/mnist

Shows the image, the capacity from noise to data, and how many experts worked on each token. The
page is served on this machine only and loads nothing from elsewhere. It uses the capacities that
tools/calibrate.py has stored; without any, a few are calibrated at the start, which is kept (for a
text model on --prompts, which should then be some dozens).
"""

import argparse
import os
import socket

from diffmoe.cli import (
    add_adapters,
    add_decoder,
    add_device,
    add_dtype,
    add_prompts,
    add_run,
    open_sampler,
)
from diffmoe.errors import UserError, run_command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run(parser)
    add_adapters(parser)
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1, only this machine")
    parser.add_argument("--port", type=int, default=7860, help="default 7860")
    add_device(parser)
    add_dtype(parser)
    add_decoder(parser)
    add_prompts(parser)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if not 0 < options.port < 65536:
        raise UserError(f"--port {options.port}: choose one from 1 to 65535")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401 (the page needs it, and opening a model takes longer)
    except ImportError:
        raise UserError('the page needs gradio: pip install "diffmoe[demo]"') from None
    refused = UserError(
        f"cannot listen at {options.host}:{options.port}; choose another --port or --host"
    )
    try:  # before the model is opened and calibrated
        with socket.create_server((options.host, options.port)):
            pass
    except OSError:
        raise refused from None
    from diffmoe.parallel.device import setup_device
    from diffmoe.routing_report.demo import build_page
    from diffmoe.sampling.dial import Dial

    sampler = open_sampler(options, setup_device(options.device))
    if not sampler.network.has_thresholds:
        raise UserError(
            f"{sampler.model.path} is a {sampler.config.moe.type} model; only diffmoe has a "
            "compute dial"
        )
    page = build_page(sampler, Dial.of(sampler, report=print), sampler.model.title)
    try:
        page.launch(server_name=options.host, server_port=options.port, quiet=False)
    except OSError:
        raise refused from None


if __name__ == "__main__":
    run_command(main)
