"""Writes samples as GenEval's evaluator reads them (arXiv 2310.11513, djghosh13/geneval)."""

import json
from collections import Counter
from pathlib import Path

from PIL import Image

from diffmoe.errors import UserError
from diffmoe.evaluation.image_sets import ImageSet, batches
from diffmoe.files import read_text


def export_geneval(images: ImageSet, metadata: str | Path, out: str | Path) -> int:
    """Write OUT/00000/metadata.jsonl and OUT/00000/samples/0000.png, ... for each prompt.

    metadata: GenEval's evaluation_metadata.jsonl, whose prompts are the captions of the samples,
    in the same order. Returns the number of images of each prompt. Raises UserError if the prompts
    differ, they have different numbers of images, or `out` is not empty.
    """
    lines, captions, out = _lines(Path(metadata)), images.captions(), Path(out)
    for number, (line, caption) in enumerate(zip(lines, captions, strict=False)):
        if json.loads(line)["prompt"] != caption:
            raise UserError(
                f"{metadata}, line {number + 1}: {json.loads(line)['prompt']!r}, but caption "
                f"{number} of {images.path} is {caption!r}; sample from the same prompts"
            )
    if len(lines) != len(captions) or images.number % len(lines):
        raise UserError(
            f"{metadata} has {len(lines)} prompts, {images.path} {images.number} images "
            f"of {len(captions)} captions; sample the same number of each prompt"
        )
    counts = Counter(label for part in images.parts() for label in part.known_labels.tolist())
    each = [counts[number] for number in range(len(lines))]
    if min(each) < max(each):
        raise UserError(
            f"{images.path} holds {min(each)} to {max(each)} "
            "images of a prompt; sample with --labels balanced"
        )
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another folder")
    for number, line in enumerate(lines):
        (out / f"{number:05d}" / "samples").mkdir(parents=True)
        (out / f"{number:05d}" / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
    written: Counter[int] = Counter()
    for part in batches(images, 50):
        for image, label in zip(part.images, part.known_labels.tolist(), strict=True):
            file = out / f"{label:05d}" / "samples" / f"{written[label]:04d}.png"
            Image.fromarray(image).save(file)
            written[label] += 1
    return each[0]


def _lines(file: Path) -> list[str]:
    """The lines of a prompts file. Raises UserError unless each has a prompt."""
    try:
        lines = [
            line for line in read_text(file, encoding="utf-8-sig").splitlines() if line.strip()
        ]
        if lines and all(isinstance(json.loads(line)["prompt"], str) for line in lines):
            return lines
        reason = "a line has no prompt" if lines else "it is empty"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise UserError(f"{file} is not GenEval's evaluation_metadata.jsonl ({reason})")
