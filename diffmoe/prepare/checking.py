"""Check a data folder: every shard, every sample, and the statistics that the model would see."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from diffmoe.contact_sheet import with_names
from diffmoe.data.autoencoders import autoencoder_of
from diffmoe.data.captions import Captions
from diffmoe.data.fetching import Fetch, Unreadable, open_shard
from diffmoe.data.latents import Sample, from_stored, model_latents
from diffmoe.data.manifest import FeatureContent, Manifest, TextContent
from diffmoe.data.reading import OpenShard, unreadable
from diffmoe.errors import UserError
from diffmoe.prepare.blank_images import BlankImages, blank_on_sheet
from diffmoe.redaction import redact
from diffmoe.seeding import keyed_generator

# A wrong scale is off by a factor of 5 or more; whitened latents (EDM2: 0.5) and pixels are within.
_DEVIATIONS = (0.35, 2.8)
_PRINTED = 20  # problems that are printed in full
_SHEET = 32  # samples on the contact sheet


@dataclass
class Report:
    """Result of a check. problems: what must be fixed. lines: what was found."""

    problems: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        problems = [f"problem: {problem}" for problem in self.problems[:_PRINTED]]
        if len(self.problems) > _PRINTED:
            problems.append(f"and {len(self.problems) - _PRINTED} more problems")
        return "\n".join([*self.lines, *(problems or ["no problems"])])


def check_data(
    directory: str | Path,
    sheet: str | Path | None,
    device: str | torch.device = "cpu",
    fetch: Fetch = Fetch(),  # noqa: B008 (a tuple)
) -> Report:
    """Read all of a data folder. Raises UserError only if its manifest cannot be read.

    sheet: where to write a PNG of up to 32 samples, each above its mirror image; None: nowhere.
    device: for decoding them.
    """
    manifest = Manifest.load(directory)
    report, statistics, blank = Report(), _Statistics(manifest), BlankImages(manifest)
    labels: Counter[int] = Counter()
    dtypes: Counter[str] = Counter()
    addresses: dict[str, str] = {}  # of the shard, by key
    shown: list[Sample] = []
    of_each = max(1, _SHEET // manifest.classes)
    lengths: list[list[int]] = []
    for sample, captions, address in _samples(directory, manifest, report, fetch):
        if sample.key in addresses:
            report.problems.append(
                f"sample key {sample.key} is in {addresses[sample.key]} and again in "
                f"{redact(address)}"
            )
        addresses[sample.key] = redact(address)
        labels[sample.label] += 1
        dtypes[str(sample.array.dtype)] += 1
        statistics.add(sample.array)
        blank.add(sample.key, sample.array)
        if captions is not None:
            lengths.append(_token_counts(captions))
        if len(shown) < _SHEET and labels[sample.label] <= of_each:
            shown.append(sample)
    shape = "x".join(map(str, manifest.shape))
    kinds = ", ".join(sorted(dtypes)) if manifest.dtype is None else manifest.dtype
    report.lines += [
        manifest.summary(directory),
        f"content {manifest.content} of {shape} in {kinds}, flips {manifest.flips}"
        + (" (mirrored on reading)" if manifest.mirrored == "on_reading" else "")
        + f", scaled {manifest.scaled}, scale {manifest.scale}, shift {manifest.shift}",
        f"autoencoder {manifest.autoencoder}, pixels {manifest.pixel_range}; {manifest.source}",
        *_histogram(labels, manifest),
        *(["features " + _feature_line(manifest.features)] if manifest.features else []),
        *([] if manifest.text is None or not lengths else _caption_lines(lengths, manifest.text)),
    ]
    if labels:
        report.lines += [*statistics.lines(), *blank.lines(problems=False)]
        report.problems += [*statistics.problems(), *blank.lines(problems=True)]
        if sheet is not None:
            _write_sheet(shown, manifest, sheet, device, report)
    return report


def _samples(
    directory: str | Path, manifest: Manifest, report: Report, fetch: Fetch
) -> Iterator[tuple[Sample, Captions | None, str]]:
    """Every good sample, its captions and its shard's name; the others are reported as problems."""
    for shard in tqdm(manifest.shards, unit="shard", dynamic_ncols=True, disable=None):
        address = shard.name
        try:
            address = manifest.address(directory, shard)
            file = open_shard(address, shard, fetch, attempts=1)
        except Unreadable as error:
            report.problems.append(unreadable(address, str(error)))
            continue
        except UserError as error:
            report.problems.append(str(error))
            continue
        with file:
            try:
                opened = OpenShard(file, shard, manifest, address)
            except UserError as error:
                report.problems.append(str(error))
                continue
            for index in range(len(opened)):
                try:
                    sample = opened.sample(index)
                    captions = None if manifest.text is None else opened.captions(index)
                    for mirrored in range(len(manifest.feature_members)):
                        opened.features(index, bool(mirrored))
                except UserError as error:
                    report.problems.append(str(error))
                else:
                    yield sample, captions, shard.name


class _Statistics:
    """Mean and standard deviation of each channel as the model would see it, in closed form."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        channels = manifest.shape[0]
        self._n, self._lowest = 0, math.inf
        self._sum, self._squares = np.zeros(channels), np.zeros(channels)

    def add(self, array: np.ndarray) -> None:
        manifest = self.manifest
        z = from_stored(array, manifest.dtype).astype(np.float64)
        variance = np.zeros(1)
        if manifest.content != "sample":
            z, spread = np.split(z, 2)
            self._lowest = min(self._lowest, spread.min())
            is_std = manifest.content == "mean_std"
            variance = spread**2 if is_std else np.exp(np.clip(spread, -30, 20))
        self._n += z[0].size
        self._sum += z.sum((1, 2))
        self._squares += (z**2 + variance).sum((1, 2))

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel after scale and shift."""
        mean = self._sum / self._n
        deviation = np.sqrt(np.maximum(self._squares / self._n - mean**2, 0))
        if not self.manifest.scaled:
            scale = np.abs(self.manifest.scale)
            mean, deviation = (mean - self.manifest.shift) * self.manifest.scale, deviation * scale
        return mean, deviation

    def lines(self) -> list[str]:
        mean, deviation = self.moments()
        return [
            "as the model sees the data, per channel:",
            "  mean      " + " ".join(f"{x:8.4f}" for x in mean),
            "  deviation " + " ".join(f"{x:8.4f}" for x in deviation),
        ]

    def problems(self) -> list[str]:
        manifest, problems = self.manifest, []
        _, deviation = self.moments()
        lowest, highest = deviation.min(), deviation.max()
        worst = lowest if lowest < _DEVIATIONS[0] else highest
        if manifest.autoencoder != "identity" and not (
            _DEVIATIONS[0] <= lowest and highest <= _DEVIATIONS[1]
        ):
            problems.append(
                f"a channel's standard deviation is {worst:.3g}, far from 1: scale="
                f"{manifest.scale} with scaled={manifest.scaled} looks wrong (missing, or applied "
                "twice?)"
            )
        if manifest.content == "mean_std" and self._lowest < 0:
            problems.append(
                f"a standard deviation is {self._lowest:.3g}, below 0: are these log-variances "
                "(content=mean_logvar)?"
            )
        if manifest.content == "mean_logvar" and self._lowest >= 0:
            problems.append(
                f"no log-variance is below 0 (the lowest is {self._lowest:.3g}): are these "
                "standard deviations (content=mean_std)?"
            )
        return problems


def _histogram(labels: Counter, manifest: Manifest) -> list[str]:
    counts = [labels[label] for label in range(manifest.classes)]
    names = manifest.class_names or [str(label) for label in range(manifest.classes)]
    empty = [name for name, count in zip(names, counts, strict=True) if count == 0]
    lines = [
        f"samples per class: {min(counts)} to {max(counts)}, median {int(np.median(counts))}"
        + (f"; {len(empty)} classes have none, such as {empty[0]}" if empty else "")
    ]
    if manifest.classes <= 20:
        widest = max(map(len, names))
        most = max(max(counts), 1)
        for name, count in zip(names, counts, strict=True):
            lines.append(f"  {name:{widest}} {count:8} {'#' * round(40 * count / most)}")
    return lines


def _token_counts(captions: Captions) -> list[int]:
    """Tokens of each caption; of bytes all, including those beyond the limit."""
    if captions.lengths is None:
        return [len(line.encode()) for line in captions.lines]
    return captions.lengths.tolist()


def _caption_lines(lengths: list[list[int]], text: TextContent) -> list[str]:
    each = [len(of_sample) for of_sample in lengths]
    every = [length for of_sample in lengths for length in of_sample]
    full = sum(length >= text.length for length in every) / len(every)
    return [
        f"captions for {text.encoder}, at most {text.length} tokens, width {text.width}, pooled "
        f"{text.pooled}",
        f"  {min(each)} to {max(each)} per sample, {min(every)} to {max(every)} tokens each; "
        f"{full:.1%} have {text.length} or more and are cut off there",
    ]


def _names(labels: list[int], names: list[str]) -> str:
    """Of the classes in a line of the sheet, which is sorted by them."""
    return ", ".join(names[label] for label in dict.fromkeys(labels))


def _feature_line(content: FeatureContent) -> str:
    channels, height, width = content.shape
    return f"of {content.encoder}, {content.layer}: {channels} channels on {height}x{width}"


def _write_sheet(
    samples: list[Sample],
    manifest: Manifest,
    path: str | Path,
    device: str | torch.device,
    report: Report,
) -> None:
    """Write the contact sheet; its path, or the reason why there is none, goes to the report."""
    try:
        autoencoder = autoencoder_of(manifest.latent_spec, device)
    except UserError as error:
        report.lines.append(f"no contact sheet: {error}")
        return
    samples = sorted(samples, key=lambda sample: sample.label)
    rows = [[sample.array for sample in samples]]
    if manifest.flips:
        rows.append([sample.flip for sample in samples if sample.flip is not None])
    strips = []
    for arrays in rows:
        latents = model_latents(arrays, manifest, keyed_generator("contact sheet"))
        images = autoencoder.decode(latents.to(torch.float32)).cpu().numpy()  # (N,H,W,3 or 1)
        strips.append(images)
    columns = min(8, len(samples))
    height, width, channels = strips[0].shape[1:]
    lines = -(-len(samples) // columns)
    page = np.full((lines * len(strips) * height, columns * width, channels), 255, np.uint8)
    for number in range(len(samples)):
        line, column = divmod(number, columns)
        for row, images in enumerate(strips):
            top, left = (line * len(strips) + row) * height, column * width
            page[top : top + height, left : left + width] = images[number]
    if channels not in (1, 3):
        report.lines.append(f"no contact sheet: {channels} channels cannot be shown")
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(page.squeeze(-1) if channels == 1 else page)
    if manifest.class_names is not None:
        labels = [sample.label for sample in samples]
        starts = range(0, len(labels), columns)
        named = [_names(labels[at : at + columns], manifest.class_names) for at in starts]
        picture = with_names(picture, named)
    picture.save(path)
    report.lines.append(f"contact sheet, by class, each image above its mirror image: {path}")
    if manifest.autoencoder != "identity":  # all pixels were checked above
        report.problems += blank_on_sheet(strips[0])
