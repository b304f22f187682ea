"""results.jsonl: one line per evaluation, with everything that defines its metrics."""

import importlib.metadata
import json
import os
import platform
import resource
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from diffmoe.errors import UserError
from diffmoe.evaluation.clip_score import Clip, clip_score
from diffmoe.evaluation.extractors import Extractor
from diffmoe.evaluation.image_sets import ImageSet
from diffmoe.evaluation.judges import Classify, class_accuracy
from diffmoe.evaluation.metrics import compute_metrics
from diffmoe.evaluation.references import Reference
from diffmoe.evaluation.scenes import Scene, SceneReader, real_accuracy, scene_accuracy
from diffmoe.evaluation.summary import summarize
from diffmoe.files import does_not_exist, read_lines

FILE_NAME = "results.jsonl"
_WELL_READ = 0.97  # of real scenes; a worse reader cannot judge a model


def measure(
    images: ImageSet, extractor: Extractor, reference: Reference, batch: int = 50
) -> dict[str, Any]:
    """A result, for `append`: metrics, warnings, images, reference, extractor, cost, versions."""
    found = summarize(images, extractor, batch)
    values, warned = compute_metrics(found, reference, extractor)
    return {
        "metrics": values,
        "warnings": warned,
        "extractor": {
            "name": extractor.name,
            "sha256": extractor.checksum,
            "device": str(extractor.device),
            "batch": batch,
        },
        "reference": reference.about,
        "duplicates": found.duplicates,
        "images_per_second": round(found.number / found.seconds, 2),
        "extractor_share": round(found.extracting / found.seconds, 4),
        **_common(images),
    }


def measure_accuracy(
    images: ImageSet, classifier: tuple[str, str | None, Classify], batch: int = 50
) -> dict[str, Any]:
    """A result whose one metric is accuracy-CLASSIFIER."""
    name, checksum, classify = classifier
    return {
        "metrics": {f"accuracy-{name}": class_accuracy(images, classify, batch)},
        "warnings": [],
        "classifier": {"name": name, "sha256": checksum, "batch": batch},
        **_common(images),
    }


def measure_scenes(
    images: ImageSet, truth: dict[str, Scene], read: SceneReader, batch: int = 50
) -> dict[str, Any]:
    """A result: which share of the scenes is as requested, and how well real ones are read.

    truth: the scene of each caption.
    """
    real = real_accuracy(truth, read)
    found = scene_accuracy(images, truth, read, batch)
    warned = []
    if real["scenes"] < _WELL_READ:
        warned.append(f"the classifiers themselves read {real['scenes']:.3f} of real scenes")
    return {
        "metrics": {f"{kind} right": share for kind, share in found.items()}
        | {f"of real ones, {kind} right": share for kind, share in real.items()},
        "warnings": warned,
        **_common(images),
    }


def measure_clip(images: ImageSet, clip: Clip, batch: int = 50) -> dict[str, Any]:
    """A result whose one metric is CLIP-score-FOLDER."""
    return {
        "metrics": {f"CLIP-score-{clip.name}": clip_score(images, clip, batch)},
        "warnings": [],
        "extractor": {"name": clip.name, "sha256": clip.checksum, "batch": batch},
        **_common(images),
    }


def _common(images: ImageSet) -> dict[str, Any]:
    return {"number": images.number, "images": images.about, **circumstances()}


def circumstances() -> dict[str, Any]:
    """What a result says of the process that measured it: peak memory, time, versions."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "peak_memory_mb": round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "diffmoe": importlib.metadata.version("diffmoe"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def append(file: Path, *results: dict[str, Any]) -> None:
    """Append a line for each result, in one write, and sync the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as stream:
        stream.write("".join(json.dumps(result, allow_nan=False) + "\n" for result in results))
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """All results of a file, or of all files in a folder and its subfolders (of array jobs)."""
    if not path.exists():
        raise UserError(f"{does_not_exist(path)}; give a folder written by tools/evaluate.py")
    files = sorted(path.rglob(FILE_NAME)) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} has no {FILE_NAME}; give a folder written by tools/evaluate.py")
    return [result for file in files for result in _read(file)]


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        results = [json.loads(line) for line in read_lines(file)]
        if all(isinstance(result["metrics"], dict) for result in results):
            return results
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise UserError(f"{file} has a line that is not a result of tools/evaluate.py; remove it")


def table(result: dict[str, Any]) -> str:
    """Metrics and warnings as text."""
    width = max(map(len, result["metrics"]))
    lines = [f"{name:{width}}  {value:.5g}" for name, value in result["metrics"].items()]
    lines.append(f"of {result['number']} images: {result['images']['path']}")
    if "reference" in result:
        reference = result["reference"]
        lines.append(f"against {reference['path']}, moments {reference['moments']}")
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"])])
