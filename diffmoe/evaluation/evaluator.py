"""The judges of one command, loaded once: reference, classifier, CLIP, scenes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffmoe.errors import UserError
from diffmoe.evaluation import results
from diffmoe.evaluation.clip_score import Clip
from diffmoe.evaluation.extractors import DEFAULT, Extractor, load_extractor
from diffmoe.evaluation.image_sets import ImageSet
from diffmoe.evaluation.judges import load_classifier
from diffmoe.evaluation.references import Reference, check_reference, load_reference
from diffmoe.evaluation.scenes import SceneReader, load_truth
from diffmoe.files import does_not_exist
from diffmoe.prepare.images import WHITE, Color


@dataclass(frozen=True)
class Judges:
    """By which images are judged, as tools/evaluate.py has it. At least one is set.

    reference: images or statistics, compared by the features of `extractor`. classifier: class
    accuracy. clip: folder of a CLIP. truth: scenes by their captions. batch: images at a time.
    background: of transparent image files.
    """

    reference: str | None = None
    extractor: str = DEFAULT
    classifier: str | None = None
    clip: str | None = None
    truth: str | None = None
    batch: int = 25
    background: Color = WHITE


class Evaluator:
    """Measures images by `Judges`. Raises UserError for one that is missing, before any work."""

    def __init__(self, judges: Judges, device: str | torch.device = "cpu") -> None:
        if not (judges.reference or judges.classifier or judges.clip or judges.truth):
            raise UserError("nothing to judge by: give --reference REF, --classifier NAME or both")
        self.judges = judges
        self._extractor: Extractor | None = None
        self._reference: Reference | None = None
        if judges.reference:
            if not Path(judges.reference).exists():
                raise UserError(f"reference {does_not_exist(judges.reference)}")
            self._extractor = load_extractor(judges.extractor, device)
            check_reference(judges.reference, self._extractor)
        self._classifier = load_classifier(judges.classifier, device) if judges.classifier else None
        self._clip = Clip(judges.clip, device) if judges.clip else None
        self._truth = load_truth(judges.truth) if judges.truth else None
        self._read: SceneReader | None = None

    def measure(self, images: ImageSet) -> list[dict[str, Any]]:
        """A result of each judge, for results.jsonl."""
        judges, found = self.judges, []
        if judges.reference and self._extractor is not None:
            if self._reference is None:
                self._reference = load_reference(
                    judges.reference, self._extractor, judges.batch, judges.background
                )
            found.append(results.measure(images, self._extractor, self._reference, judges.batch))
        if self._classifier is not None:
            found.append(results.measure_accuracy(images, self._classifier, judges.batch))
        if self._clip is not None:
            found.append(results.measure_clip(images, self._clip, judges.batch))
        if self._truth is not None:
            self._read = self._read or SceneReader()
            found.append(results.measure_scenes(images, self._truth, self._read, judges.batch))
        return found
