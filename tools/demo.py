"""Try a model in the browser: class or caption, seed, guidance, and how much it computes.

  python tools/demo.py runs/mnist

Shows the image, the capacity from noise to data, and how many experts worked on each token. The
page is served from this machine alone and loads nothing from elsewhere. Capacities that
tools/calibrate.py has stored are used; without any, a few are calibrated at the start (of a text
model on --prompts, which then should be some dozen).
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffmoe.cli import add_device, add_prompts, prompts_of
from diffmoe.errors import UserError, run_command

if TYPE_CHECKING:
    from PIL import Image

    from diffmoe.config import Config
    from diffmoe.models.dit import DiT
    from diffmoe.sampling.dial import Dial
    from diffmoe.sampling.images import Decode
    from diffmoe.text.prompts import Prompts


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", metavar="RUN", help="a run's folder, one checkpoint, or a converted model"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=7860, help="default 7860")
    add_device(parser)
    add_prompts(parser)
    return parser.parse_args()


def main() -> None:
    options = parse()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise UserError('the page needs gradio: pip install -e ".[demo]"') from None
    from diffmoe.data.autoencoders import autoencoder_of
    from diffmoe.diffusion.settings import SamplingSettings
    from diffmoe.export.open import locate, open_network, weights_of
    from diffmoe.parallel.device import setup_device
    from diffmoe.sampling.dial import Dial
    from diffmoe.sampling.latents import fitted

    device = setup_device(options.device)
    if not 0 < options.port < 65536:
        raise UserError(f"--port {options.port}: choose one from 1 to 65535")
    folder = locate(options.run)
    weights = weights_of(folder, "ema")
    snapshot = open_network(folder, weights, device=device)
    network, config = snapshot.network, snapshot.config
    if not network.has_thresholds:
        raise UserError(f"{folder} is a {config.moe.type} model; only diffmoe has a compute dial")
    prompts = prompts_of(options, config, device)
    dial = Dial.of(network, config, folder, weights, report=print, prompts=prompts)
    decode = autoencoder_of(snapshot.latents, device).decode
    names = snapshot.class_names or [str(k) for k in range(config.model.num_classes)]
    if prompts is None:
        wanted = gradio.Dropdown(list(names), value=names[0], type="index", label="Class")
    else:
        wanted = gradio.Textbox(prompts.captions[0], label="Caption")
    away = gradio.Textbox(
        (prompts and prompts.negative) or "", label="Not this", visible=prompts is not None
    )
    least, most = dial.capacities[0], dial.capacities[-1]
    guidance = fitted(SamplingSettings(guidance=None), config, prompts, print).guidance

    with gradio.Blocks(title=f"DiffMoE: {options.run}", analytics_enabled=False) as page:
        gradio.Markdown(f"## {options.run}\nCapacity is how many experts work on an average token.")
        with gradio.Row():
            with gradio.Column(scale=1):
                inputs = [
                    wanted.render(),
                    away.render(),
                    gradio.Number(0, precision=0, label="Seed"),
                    gradio.Slider(2, 250, value=50, step=1, label="Steps"),
                    gradio.Slider(
                        *(1, 5),
                        value=guidance,
                        step=0.1,
                        label="Guidance",
                        visible=guidance != 1,
                    ),
                    gradio.Slider(
                        least,
                        most,
                        value=min(max(1, least), most),
                        step=0.01,
                        label="Capacity",
                        info=f"calibrated: {', '.join(f'{c:g}' for c in dial.capacities)}",
                    ),
                ]
                button = gradio.Button("Generate", variant="primary")
            with gradio.Column(scale=2):
                with gradio.Row():
                    with gradio.Column():
                        gradio.Markdown("Image")
                        image = gradio.Image(
                            elem_id="image", show_label=False, format="png", height=280, buttons=[]
                        )
                    with gradio.Column():
                        gradio.Markdown("Experts at work on each token")
                        compute = gradio.Image(
                            elem_id="compute",
                            show_label=False,
                            format="png",
                            height=280,
                            buttons=[],
                        )
                told = gradio.Textbox(label="Compute")
                gradio.Markdown("Capacity from noise to data")
                course = gradio.Image(elem_id="course", show_label=False, format="png", buttons=[])
        outputs = [image, compute, course, told]

        def answered(*wanted: Any) -> tuple:
            try:
                return answer(network, config, decode, dial, prompts, *wanted)
            except UserError as error:  # on the page, in its words
                raise gradio.Error(str(error)) from None

        button.click(answered, inputs, outputs)
    try:
        page.launch(server_name=options.host, server_port=options.port, quiet=False)
    except OSError:
        raise UserError(
            f"nothing can listen at {options.host}:{options.port}; choose another --port or --host"
        ) from None


def answer(
    network: DiT,
    config: Config,
    decode: Decode,
    dial: Dial,
    prompts: Prompts | None,
    wanted: int | str,
    away: str,
    seed: int,
    steps: int,
    guidance: float,
    capacity: float,
) -> tuple[Image.Image, Image.Image, Image.Image, str]:
    """The image, where its compute went, C by time, and both in words.

    wanted: a class's number; of a text model, which has prompts, a caption.
    away: of a text model a caption that guidance leads away from; empty: the null caption.
    """
    from PIL import Image

    from diffmoe.capacity.meter import activated_parameters
    from diffmoe.diffusion.settings import SamplingSettings
    from diffmoe.routing_report.analysis import sampling_routing
    from diffmoe.routing_report.figures import capacity_by_time, compute_map, picture

    dial.turn(network, capacity)
    settings = SamplingSettings(steps=int(steps), guidance=guidance, seed=int(seed or 0))
    label = wanted
    if prompts is not None:
        label, prompts = 0, replace(prompts, captions=(wanted,), negative=away.strip() or None)
    found = sampling_routing(network, config, decode, [label], settings, prompts=prompts)
    average = found.capacity.average
    active, total = activated_parameters(network, average), network.parameter_count()
    image = Image.fromarray(found.images[0].squeeze(-1).numpy())
    return (
        image.resize((280, 280), Image.Resampling.NEAREST),
        picture(compute_map(found, 0)),
        picture(capacity_by_time(found)),
        f"capacity {average:.3f}: {active / 1e6:.2f} of {total / 1e6:.2f} million parameters work "
        "on an average token",
    )


if __name__ == "__main__":
    run_command(main)
