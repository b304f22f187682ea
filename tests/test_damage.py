"""Seeded damage to every kind of file that we read: an error that names it, or the right result.

Within 10 seconds and 1 GB, without a traceback. DIFFMOE_MUTATIONS=2000 looks harder:

  DIFFMOE_MUTATIONS=2000 python -m pytest tests/test_damage.py
"""

import contextlib
import gzip
import hashlib
import itertools
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from diffmoe.capacity.thresholds import Calibrated, store, stored
from diffmoe.checkpoints.network import load_network
from diffmoe.conversion.detect_format import open_source
from diffmoe.conversion.foreign import Options, write_foreign
from diffmoe.conversion.info import info
from diffmoe.data.lanes import DataSource
from diffmoe.data.manifest import Manifest
from diffmoe.data.stream import LatentStream
from diffmoe.errors import UserError
from diffmoe.evaluation.geneval import _lines as geneval_lines
from diffmoe.evaluation.image_sets import batches, open_images
from diffmoe.evaluation.references import check_reference, load_reference, store_reference
from diffmoe.evaluation.results import read as read_results
from diffmoe.evaluation.scenes import load_truth
from diffmoe.export.open import load
from diffmoe.export.stored_tensors import StoredTensors
from diffmoe.parallel.zero import read_ds_config
from diffmoe.prepare.checking import check_data
from diffmoe.prepare.encoding import Encoding, encode_images
from diffmoe.prepare.foreign_latents import import_latents
from diffmoe.prepare.image_folders import ImageSource
from diffmoe.prepare.sharding import ShardOutput
from diffmoe.recipes import load_config
from diffmoe.text.prompts import read_captions
from diffmoe.training.resume import find_checkpoint
from tests.helpers.damage import copied, damage, watched
from tests.helpers.models import exported, release_file, source_of
from tests.helpers.pictures import extractor, pictures, write_samples
from tests.helpers.runs import pack, run_config, train
from tests.helpers.shards import photograph
from tests.helpers.tiny import tiny_config

MUTATIONS = int(os.environ.get("DIFFMOE_MUTATIONS", "40"))
ROOT = Path(__file__).parents[1]


class Kind(NamedTuple):
    """What is damaged.

    make: writes it in a folder, and tells where. read: all that the project would read of it.
    sealed: checksums hold what is read to what was written. seal: mends the checksums after a file
    was damaged, as somebody would who means it; what is read then may be anything.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    sealed: bool = False
    seal: Callable[[Path, Path], None] | None = None


def tensors(path: Path) -> dict[str, Tensor]:
    with open_source(path, options=Options(objective="flow", heads=2, num_classes=10)) as source:
        source = source.checked()
        return {name: source.read(name).clone() for name in source.shapes}


def checkpoint(folder: Path) -> Path:
    pack(folder / "data")
    config = run_config(folder, 2, model__depth=2, moe__experts=2)
    train(config)
    return folder / "run/step-00000002"


def old_checkpoint(folder: Path) -> Path:
    with tarfile.open(Path(__file__).parent / "training/old_checkpoint.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "step-00000002"


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    with contextlib.suppress(UserError):  # what is not verified may be read, and must not crash
        load_network(path)
    info(path)
    return tensors(path)


def read_exported(path: Path) -> dict[str, Tensor]:
    with contextlib.suppress(UserError):
        load(path)
    info(path)
    stored(path)  # the thresholds, which calibration adds and no checksum holds
    return tensors(path)


def calibrated(folder: Path) -> Path:
    path = exported(folder / "model", tiny_config(model__depth=2))
    entry = {"weights": "ema", "capacity": 0.5, "measured": 0.5, "common": True, "over": "noise"}
    store(path, "0.5", Calibrated(**entry, samples=8, log_odds=[[0.0] * 4]))
    return path


def weights(folder: Path) -> Path:
    (folder / "weights").mkdir()
    return Path(shutil.copy(calibrated(folder) / "model.safetensors", folder / "weights")).parent


def diffusers_folder(folder: Path) -> Path:
    config = tiny_config(model__depth=2, moe__type="dense", diffusion__objective="ddpm")
    config = config.replace({"model.learn_sigma": True})
    write_foreign(source_of(config), folder / "diffusers", "diffusers")
    return folder / "diffusers"


def mended_checksums(path: Path, file: Path) -> None:
    listed = path / "checksums.json"
    if listed == file or not _plain(file):
        return
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        values, raw = json.loads(listed.read_text()), file.read_bytes()
        values["files"][file.name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        listed.write_text(json.dumps(values))


def _plain(file: Path) -> bool:
    return file.is_file() and file.stat().st_size < 1 << 30


def data_folder(folder: Path) -> Path:
    return pack(folder / "data", [3, 4])


def captioned_folder(folder: Path) -> Path:
    return pack(folder / "data", [3, 4], text={"encoder": "bytes", "length": 8})


def read_data(path: Path) -> list[Tensor]:
    report = check_data(path, None)
    if report.problems:
        raise UserError(report.problems[0])
    manifest = Manifest.load(path)
    manifest.check(path, 2)
    source = DataSource(path, manifest, lanes=2, seed=0)
    stream = LatentStream(source, range(2), 2, captions=manifest.text is not None)
    return [batch.latents for batch in itertools.islice(stream, 3)]


def mended_manifest(path: Path, file: Path) -> None:
    if file.name == "manifest.json" or not _plain(file):
        return
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        values = json.loads((path / "manifest.json").read_text())
        for shard in values["shards"]:
            raw = (path / shard["name"]).read_bytes()
            shard |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        (path / "manifest.json").write_text(json.dumps(values))


def read_images(path: Path) -> list[np.ndarray]:
    return [part.images.copy() for part in batches(open_images(path), 8)]


def adm(folder: Path) -> Path:
    np.savez(folder / "adm.npz", pictures(6), np.arange(6))
    return folder / "adm.npz"


def packed_adm(folder: Path) -> Path:
    np.savez_compressed(folder / "adm.npz", pictures(6), np.arange(6))
    return folder / "adm.npz"


def reference_file(folder: Path) -> Path:
    np.savez(folder / "images.npz", pictures(6))
    store_reference(folder / "reference.npz", load_reference(folder / "images.npz", extractor()))
    return folder / "reference.npz"


def read_reference(path: Path) -> Any:
    check_reference(path, extractor())
    return load_reference(path, extractor())


def photo_folder(folder: Path) -> Path:
    for index, kind in enumerate(["png", "jpg", "webp", "bmp", "tiff", "ppm"]):
        place = folder / "photos" / "ab"[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        photograph(index).save(place / f"{index}.{kind}")
    return folder / "photos"


def photo_tar(folder: Path) -> Path:
    source = photo_folder(folder)
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars/0.tar", "w") as tar:
        for index, file in enumerate(sorted(source.rglob("*.*"))):
            (folder / "cls").write_text(str(index % 2))
            tar.add(file, f"{index}{file.suffix}")
            tar.add(folder / "cls", f"{index}.cls")
    return folder / "tars"


def compressed_tar(folder: Path) -> Path:
    tars = photo_tar(folder)
    (tars / "0.tar.gz").write_bytes(gzip.compress((tars / "0.tar").read_bytes()))
    (tars / "0.tar").unlink()
    return tars


def table_of(kind: str) -> Callable[[Path], Path]:
    """A data set of Hugging Face."""

    def make(folder: Path) -> Path:
        from tests.helpers import tables

        write = tables.write_parquet if kind == "parquet" else tables.write_arrow
        write(folder / f"tables/train.{kind}", tables.labeled())
        return folder / "tables"

    return make


def encoded(path: Path) -> int:
    out = path.parent / "packed"
    shutil.rmtree(out, ignore_errors=True)
    classes = 2 if list(path.glob("*.tar*")) else None
    images = ImageSource(path, classes=classes)
    return encode_images(images, Encoding(size=8), ShardOutput(out, shards=1), workers=1).samples


def latents_of(kind: str) -> tuple[Callable[[Path], Path], Callable[[Path], Any]]:
    """Those of another project. The answers are what their files leave open."""

    def make(folder: Path) -> Path:
        root, rng = folder / kind, np.random.default_rng(0)
        moments = rng.standard_normal((4, 8, 4, 4)).astype(np.float32)
        root.mkdir()
        if kind == "mar":
            for index, array in enumerate(moments):
                (root / f"{index % 2}").mkdir(exist_ok=True)
                np.savez(root / f"{index % 2}/{index}.npz", moments=array, moments_flip=array)
        elif kind in ("repa", "edm2"):
            (root / "00000").mkdir()
            names = [f"00000/img-mean-std-{index:08d}.npy" for index in range(4)]
            for name, array in zip(names, np.abs(moments), strict=True):
                np.save(root / name, array)
            labels = [[name, 1] for name in names]
            (root / "dataset.json").write_text(json.dumps({"labels": labels}))
            if kind == "edm2":
                return Path(shutil.make_archive(str(root), "zip", root))
        else:
            z = torch.from_numpy(moments[:, :4]).contiguous()
            stored = {"latents": z, "latents_flip": z.clone(), "labels": torch.arange(4)}
            save_file(stored, root / "latents.safetensors")
            statistics = {"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}
            torch.save(statistics, root / "latents_stats.pt")
        return root

    def read(path: Path) -> int:
        from diffmoe.prepare import latent_formats

        # These know files by their names.
        latent_formats._open_safetensors.cache_clear()
        latent_formats._open_zip.cache_clear()
        out = path.parent / "imported"
        shutil.rmtree(out, ignore_errors=True)
        answers = {"vae": "somebody/vae", "classes": 5, "scale": 0.5, "multiplier": 1.0}
        needed = {"mar": ("vae", "scale"), "lightningdit": ("vae", "classes", "multiplier")}
        needed = needed.get(kind, ("vae", "classes"))
        answers = {name: value for name, value in answers.items() if name in needed}
        return import_latents(kind, path, ShardOutput(out, shards=1), answers=answers).samples

    return make, read


def text_file(name: str, text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return make


def run_folder(folder: Path) -> Path:
    return checkpoint(folder / "whole").parents[1]


def resumed(path: Path) -> Any:
    config = run_config(path, 2, model__depth=2, moe__experts=2)
    return find_checkpoint(config, "auto").checkpoint


RESULT = {"metrics": {"FD": 1.0}, "number": 5, "images": {"path": "x"}, "warnings": []}
TRUTH = [{"prompt": "p", "relation": "left of", "colors": ["red", "blue"], "digits": [1, 2]}]
YAML = "output: x\n" + yaml.safe_dump(tiny_config().model_dump(mode="json", exclude={"output"}))
DS = (ROOT / "deepspeed_configs/zero1_bf16.json").read_text()
KINDS = {
    "checkpoint": Kind(checkpoint, read_checkpoint, True, mended_checksums),
    "old checkpoint": Kind(old_checkpoint, read_checkpoint, True, mended_checksums),
    "resume": Kind(run_folder, resumed),
    "export": Kind(calibrated, read_exported, True, mended_checksums),
    "release file": Kind(
        lambda d: release_file(d / "release.pt", "diffmoe_interleave"), tensors, True
    ),
    "diffusers folder": Kind(diffusers_folder, tensors),
    "safetensors": Kind(weights, lambda path: StoredTensors(path, "model.safetensors").shapes),
    "manifest and tar": Kind(data_folder, read_data, False, mended_manifest),
    "captions": Kind(captioned_folder, read_data, False, mended_manifest),
    "samples": Kind(lambda d: write_samples(d / "samples", pictures(6)), read_images),
    "adm npz": Kind(adm, read_images),
    "packed npz": Kind(packed_adm, read_images),
    "reference npz": Kind(reference_file, read_reference),
    "image files": Kind(photo_folder, encoded),
    "image files to evaluate": Kind(photo_folder, read_images),
    "images in tars": Kind(photo_tar, encoded),
    "images in compressed tars": Kind(compressed_tar, encoded),
    "images in parquet": Kind(table_of("parquet"), encoded),
    "images in arrow": Kind(table_of("arrow"), encoded),
    "mar": Kind(*latents_of("mar")),
    "repa": Kind(*latents_of("repa")),
    "edm2 zip": Kind(*latents_of("edm2")),
    "lightningdit": Kind(*latents_of("lightningdit")),
    "yaml": Kind(text_file("run.yaml", YAML), lambda path: load_config(str(path))),
    "deepspeed json": Kind(text_file("ds.json", DS), lambda path: read_ds_config(str(path))),
    "results": Kind(text_file("results.jsonl", json.dumps(RESULT) + "\n"), read_results),
    "truth": Kind(text_file("unseen.json", json.dumps(TRUTH)), load_truth),
    "geneval": Kind(text_file("metadata.jsonl", '{"prompt": "a dog"}\n'), geneval_lines),
    "prompts": Kind(text_file("prompts.txt", "a dog\na cat\n"), read_captions),
}


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return a == b


@pytest.mark.slow
@pytest.mark.timeout(600 + MUTATIONS)
@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_end_in_an_error_or_the_right_result(name: str, tmp_path: Path, capfd):
    kind, rng = KINDS[name], random.Random(name)
    original = kind.make(tmp_path)
    with watched():
        expected = kind.read(original)
    (tmp_path / "copies").mkdir()
    copy, refused, files = tmp_path / "copies" / original.name, 0, files_of(original)
    for turn in range(MUTATIONS):
        copied(original, copy)
        chosen = rng.choice(files)
        file = copy / chosen.relative_to(original) if original.is_dir() else copy
        how = damage(file, rng)
        sealed = kind.sealed
        if kind.seal is not None and rng.random() < 0.7:
            kind.seal(copy, file)
            sealed = False
        where = f"{name}, turn {turn}: {how} of {file.name}"
        found = told = None
        try:
            with watched():
                found = kind.read(copy)
        except UserError as error:
            told = str(error)
        except BaseException as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        if told is not None:
            refused += 1
            assert file.name in told or str(copy) in told, f"{where}: {told}"
        elif sealed:
            assert equal(found, expected), where
        capfd.readouterr()
    assert refused > MUTATIONS // 8, f"{refused} of {MUTATIONS} were refused"
