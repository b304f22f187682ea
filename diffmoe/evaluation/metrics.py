"""All metrics of images against a reference."""

from typing import NamedTuple

from diffmoe.evaluation.extractors import Extractor
from diffmoe.evaluation.fid import frechet_distance, too_few
from diffmoe.evaluation.kid import kernel_distance
from diffmoe.evaluation.precision_recall import precision_and_recall
from diffmoe.evaluation.references import Reference
from diffmoe.evaluation.summary import Summary


class Metrics(NamedTuple):
    """values: by names that end in the extractor's, such as FD-efficientnet_lite0@224."""

    values: dict[str, float]
    warnings: list[str]


def compute_metrics(samples: Summary, reference: Reference, extractor: Extractor) -> Metrics:
    """All metrics that samples and reference have the data for.

    sFD needs spatial features, IS probabilities; KID, precision and recall need the features of
    both.
    """
    values = {"FD": frechet_distance(samples.pooled, reference.pooled)}
    if samples.spatial is not None and reference.spatial is not None:
        values["sFD"] = frechet_distance(samples.spatial, reference.spatial)
    if samples.inception_score is not None:
        values["IS"], values["IS_spread"] = samples.inception_score
    if reference.features is not None:
        kid = kernel_distance(samples.features, reference.features)
        values["KID"], values["KID_spread"] = kid.mean, kid.spread
        near = precision_and_recall(samples.features, reference.features)
        values["precision"], values["recall"] = near
    warned = [too_few("samples", samples.pooled), too_few("reference", reference.pooled)]
    shape = reference.about.get("image_shape")
    if shape is not None and list(samples.shape) != shape:
        warned.append(f"samples are {samples.shape}, the reference's images {tuple(shape)}")
    if samples.duplicates:
        warned.append(f"{samples.duplicates} of {samples.number} samples equal an earlier one")
    named = {extractor.metric(name): value for name, value in values.items()}
    return Metrics(named, [text for text in warned if text])
