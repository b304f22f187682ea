"""From an opened model to the report on its routing."""

from pathlib import Path

from tqdm import tqdm

from diffmoe.capacity.meter import activated_parameters
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.routing_report.analysis import SamplingRouting, predictor_accuracy, sampling_routing
from diffmoe.routing_report.page import write_page
from diffmoe.sampling.many_images import SampleRequest
from diffmoe.sampling.passes import Passes
from diffmoe.sampling.sampler import Sampler


def write_report(
    sampler: Sampler,
    file: Path,
    title: str,
    request: SampleRequest,
    settings: SamplingSettings,
    *,
    batch: int = 50,
    passes: Passes | None = None,
) -> SamplingRouting:
    """Sample the request's images, analyze their routing and write the page.

    passes: over real data, to compare the capacity predictor with the selection of training.
    """
    accuracy = None
    if passes is not None:
        with sampler.routed():
            accuracy = predictor_accuracy(sampler.network, passes)
    labels = request.all_labels(settings.seed)
    with tqdm(total=len(labels), unit="image", dynamic_ncols=True, disable=None) as bar:

        def progress(done: float) -> None:
            bar.update(round(done) - bar.n)

        routing = sampling_routing(
            sampler,
            labels,
            settings,
            batch=batch,
            progress=progress,
        )
    average, network = routing.capacity.average, sampler.network
    facts = {
        "trained on": f"{sampler.model.clock.samples:,} samples",
        "capacity C": f"{average:.3f}",
        "parameters at work": f"{activated_parameters(network, average) / 1e6:.2f} million",
        "of all": f"{network.parameter_count() / 1e6:.2f} million",
        "sampled": f"{len(labels)} images, {settings.steps} steps, guidance {settings.guidance}, "
        f"in {sampler.dtype}",
    }
    captions = None if sampler.prompts is None else sampler.prompts.captions
    class_names = sampler.model.class_names
    write_page(file, title, facts, routing, accuracy, captions, class_names)
    return routing
