"""The page of tools/demo.py: one image, its capacity by time, the compute on each token."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from diffmoe.capacity.meter import compute_text
from diffmoe.capacity.thresholds import CapacityChoice
from diffmoe.diffusion.settings import PREVIEW_STEPS, SamplingSettings
from diffmoe.errors import UserError
from diffmoe.routing_report.analysis import sampling_routing
from diffmoe.routing_report.figures import capacity_by_time, compute_map, picture
from diffmoe.sampling.dial import Dial
from diffmoe.sampling.sampler import Sampler

if TYPE_CHECKING:
    import gradio

_SIZE = 280  # of the pictures, in pixels


class Inputs(NamedTuple):
    """What the page's fields hold, in their order.

    wanted: a class's number; of a text model a caption. negative: of a text model, a caption that
    guidance leads away from; empty: the null caption.
    """

    wanted: int | str
    negative: str
    seed: int | None
    steps: float
    guidance: float
    capacity: float


def answer(
    sampler: Sampler, dial: Dial, inputs: Inputs
) -> tuple[Image.Image, Image.Image, Image.Image, str]:
    """The image, the compute on its tokens, C by time, and the compute in words."""
    settings = SamplingSettings(
        steps=int(inputs.steps), guidance=inputs.guidance, shift=None, seed=int(inputs.seed or 0)
    ).with_shift_of(sampler.config)
    label, prompts = inputs.wanted, sampler.prompts
    if prompts is not None:
        negative = inputs.negative.strip() or None
        label, prompts = 0, replace(prompts, captions=(str(inputs.wanted),), negative=negative)
    choice = CapacityChoice(dial.at(inputs.capacity), inputs.capacity)
    sampler = replace(sampler, prompts=prompts, choice=choice)
    found = sampling_routing(sampler, [int(label)], settings)
    image = Image.fromarray(found.images[0].squeeze(-1).numpy())
    return (
        image.resize((_SIZE, _SIZE), Image.Resampling.NEAREST),
        picture(compute_map(found, 0)),
        picture(capacity_by_time(found)),
        compute_text(sampler.network, found.capacity.average),
    )


def build_page(sampler: Sampler, dial: Dial, name: str) -> "gradio.Blocks":
    """The page of a model, not yet served. name: of the model, for the heading."""
    import gradio

    prompts, names = sampler.prompts, sampler.model.class_names
    wanted: Any
    if prompts is None:
        choices = list(names) or [str(number) for number in range(sampler.choices)]
        wanted = gradio.Dropdown(choices, value=choices[0], type="index", label="Class")
    else:
        wanted = gradio.Textbox(prompts.captions[0], label="Caption")
    negative = gradio.Textbox(
        (prompts and prompts.negative) or "", label="Not this", visible=prompts is not None
    )
    notes: list[str] = []
    guidance = sampler.fitted(SamplingSettings(guidance=None), notes.append).guidance
    # A negative prompt guides a text model, too.
    can_guide = guidance != 1 or prompts is not None
    least, most = dial.capacities[0], dial.capacities[-1]

    def shown(label: str) -> gradio.Image:
        return gradio.Image(elem_id=label, show_label=False, format="png", height=_SIZE, buttons=[])

    def answered(*values: Any) -> tuple:
        try:
            return answer(sampler, dial, Inputs(*values))
        except UserError as error:
            raise gradio.Error(str(error)) from None

    with gradio.Blocks(title=f"DiffMoE: {name}", analytics_enabled=False) as page:
        about = ["Capacity is how many experts work on an average token.", *notes]
        gradio.Markdown(f"## {name}\n" + "\n\n".join(about))
        with gradio.Row():
            with gradio.Column(scale=1):
                fields = [
                    wanted.render(),
                    negative.render(),
                    gradio.Number(0, precision=0, label="Seed"),
                    gradio.Slider(2, 250, value=PREVIEW_STEPS, step=1, label="Steps"),
                    gradio.Slider(
                        1, 5, value=guidance, step=0.1, label="Guidance", visible=can_guide
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
                        image = shown("image")
                    with gradio.Column():
                        gradio.Markdown("Experts at work on each token")
                        compute = shown("compute")
                text = gradio.Textbox(label="Compute")
                gradio.Markdown("Capacity from noise to data")
                course = gradio.Image(elem_id="course", show_label=False, format="png", buttons=[])
        button.click(answered, fields, [image, compute, course, text])
    return page
