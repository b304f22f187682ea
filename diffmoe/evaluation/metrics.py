"""All figures of some images against a reference; every name carries the extractor."""

from typing import NamedTuple

from diffmoe.evaluation.extractors import Extractor
from diffmoe.evaluation.fid import frechet_distance, too_few
from diffmoe.evaluation.kid import kernel_distance
from diffmoe.evaluation.precision_recall import precision_and_recall
from diffmoe.evaluation.references import Reference
from diffmoe.evaluation.summary import Summary


class Figures(NamedTuple):
    """values by name, such as FD-efficientnet_lite0@224; what there is to warn of."""

    values: dict[str, float]
    warnings: list[str]


def figures(samples: Summary, reference: Reference, extractor: Extractor) -> Figures:
    """What samples and reference allow: sFD needs spatial features, IS probabilities, and KID,
    precision and recall the features themselves.
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
    return Figures(named, [text for text in warned if text])
