"""Every format written here as its project writes it, imported, and read as the model sees it."""

import io
import json
import lzma
import tarfile
import zipfile
from dataclasses import fields

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffmoe.data.autoencoders import autoencoder_of
from diffmoe.data.latents import model_latents
from diffmoe.data.reading import read_shard
from diffmoe.errors import UserError
from diffmoe.prepare.foreign_latents import import_latents
from diffmoe.prepare.sharding import ShardOutput
from diffmoe.seeding import keyed_generator
from tests.helpers.autoencoders import tiny
from tests.helpers.shards import members

N, SHAPE = 12, (4, 3, 3)
rng = np.random.default_rng(0)
MEANS = rng.normal(2, 4, (N, *SHAPE)).astype(np.float32)
FLIPS = rng.normal(2, 4, (N, *SHAPE)).astype(np.float32)
SPREADS = rng.uniform(1e-4, 2e-4, (N, *SHAPE)).astype(np.float32)  # so small that draws are means
LABELS = [i * i % 5 for i in range(N)]


def fast_dit(root):
    for kind in ("features", "labels"):
        (root / f"imagenet256_{kind}").mkdir(parents=True)
    for i in range(N):
        np.save(root / f"imagenet256_features/{i}.npy", MEANS[i][None] * np.float32(0.18215))
        np.save(root / f"imagenet256_labels/{i}.npy", np.array([LABELS[i]]))


def mar(root):
    for i in range(N):
        folder = root / f"n0{LABELS[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        moments, flip = (
            np.concatenate([mean[i], 2 * np.log(SPREADS[i])]) for mean in (MEANS, FLIPS)
        )
        np.savez(folder / f"n0_{i}.JPEG.npz", moments=moments, moments_flip=flip)


def dc_ae(root):
    for i in range(N):
        (root / f"n0{LABELS[i]}").mkdir(parents=True, exist_ok=True)
        np.save(root / f"n0{LABELS[i]}/n0_{i}.npy", MEANS[i] * np.float32(0.4))


def mean_std(root):
    labels = []
    for i in range(N):
        name = f"{i // 10:05d}/img-mean-std-{i:08d}.npy"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / name, np.concatenate([MEANS[i], SPREADS[i]]))
        labels.append([name, LABELS[i]])
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))


def lightning_dit(root):
    root.mkdir()
    for shard, part in enumerate([slice(0, 7), slice(7, N)]):
        arrays = {"latents": torch.tensor(MEANS[part]), "latents_flip": torch.tensor(FLIPS[part])}
        save_file(
            {**arrays, "labels": torch.tensor(LABELS[part])},
            root / f"latents_rank00_shard{shard:03d}.safetensors",
        )
    mean, std = (torch.tensor([1.0, 2, 3, 4]), torch.tensor([2.0, 4, 5, 8]))
    stats = {"mean": mean.reshape(1, 4, 1, 1), "std": std.reshape(1, 4, 1, 1)}
    torch.save(stats, root / "latents_stats.pt")


def webdataset(root):
    root.mkdir()
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for i in range(shard, N, 2):
                stream = io.BytesIO()
                np.save(stream, np.concatenate([MEANS[i], SPREADS[i]]))
                for name, content in [
                    ("npy", stream.getvalue()),
                    ("cls", str(LABELS[i]).encode()),
                ]:
                    info = tarfile.TarInfo(f"image {i}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


RAW_MEAN = np.array([5.81, 3.25, 0.12, -2.15])[:, None, None]
RAW_STD = np.array([4.17, 4.62, 3.71, 3.28])[:, None, None]
STATS = np.array([[1.0, 2, 3, 4], [2, 4, 5, 8]])[:, :, None, None]
# Format: who writes it, what must be said, what the model must see of an unscaled mean.
CASES = {
    "fast-dit": (fast_dit, {"classes": 5}, lambda z: z * 0.18215),
    "mar": (mar, {"scale": 0.2325}, lambda z: z * 0.2325),
    "dcae": (dc_ae, {"scale": 0.4}, lambda z: z * 0.4),
    "repa": (mean_std, {"classes": 5}, lambda z: z * 0.18215),
    "edm2": (mean_std, {"classes": 5}, lambda z: (z - RAW_MEAN) / RAW_STD * 0.5),
    "lightningdit": (
        lightning_dit,
        {"classes": 5, "multiplier": 0.5},
        lambda z: (z - STATS[0]) / STATS[1] * 0.5,
    ),
    "webdataset": (
        webdataset,
        {"classes": 5, "content": "mean_std", "scaled": False, "scale": 0.3, "shift": 0.1},
        lambda z: (z - 0.1) * 0.3,
    ),
}

OF_FOLDERS = ("mar", "dcae")  # formats whose classes are folders


def run(kind, root, out, **options):
    answers = {"vae": "some/vae", **CASES[kind][1], **options.pop("answers", {})}
    names = [field.name for field in fields(ShardOutput) if field.name in options]
    output = ShardOutput(out, **{"shards": 3, **{name: options.pop(name) for name in names}})
    return import_latents(kind, root, output, answers=answers, **options)


@pytest.mark.parametrize("kind", CASES)
def test_the_model_sees_what_the_project_trains_on(tmp_path, kind):
    write, _, wanted = CASES[kind]
    write(tmp_path / "in")
    manifest = run(kind, tmp_path / "in", tmp_path / "out", dtype="float32")
    assert (manifest.shape, manifest.classes, manifest.samples) == (
        SHAPE,
        3 if kind in OF_FOLDERS else 5,
        N,
    )
    assert manifest.autoencoder == "some/vae"
    samples = [
        s for shard in manifest.shards for s in read_shard(tmp_path / "out" / shard.name, manifest)
    ]
    present = sorted(set(LABELS))  # they number the folders that are there
    of_mean = {}
    for sample in samples:
        index = int(np.abs(MEANS - _unscaled_mean(kind, sample)).sum((1, 2, 3)).argmin())
        of_mean[index] = sample
        label = LABELS[index]
        assert sample.label == (present.index(label) if kind in OF_FOLDERS else label)
    assert sorted(of_mean) == list(range(N))
    flips = [of_mean[i].flip for i in range(N)] if manifest.flips else None
    seen = [of_mean[i].array for i in range(N)]
    plain = model_latents(seen, manifest, keyed_generator(0)).numpy()
    assert np.allclose(plain, wanted(MEANS), atol=1e-3)
    assert manifest.flips == (kind in ("mar", "lightningdit"))
    if flips:
        mirrored = model_latents(flips, manifest, keyed_generator(0)).numpy()
        assert np.allclose(mirrored, wanted(FLIPS), atol=1e-3)


def _unscaled_mean(kind, sample):
    return sample.array[:4] / {"fast-dit": 0.18215, "dcae": 0.4}.get(kind, 1)


def test_imported_latents_are_decoded_to_their_images(tmp_path):
    """Of real autoencoders: DC-AE's scaled latents, and EDM2's whitened ones of pixels in 0..1."""
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for kind, name in [("dcae", "AutoencoderDC"), ("edm2", "AutoencoderTiny")]:
        model = tiny(name).eval()
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            z = next(iter(model.encode(images * 2 - 1 if kind == "dcae" else images).values()))
            back = model.decode(z).sample
        wanted = (back + 1) / 2 if kind == "dcae" else back
        root, labels = tmp_path / kind, []
        for i, latent in enumerate(z.numpy()):
            place = root / ("a" if kind == "dcae" else "00000")
            place.mkdir(parents=True, exist_ok=True)
            if kind == "dcae":
                np.save(place / f"{i}.npy", latent * np.float32(0.41))
            else:
                moments = np.concatenate([latent, np.full_like(latent, 1e-7)])
                np.save(place / f"img-mean-std-{i:08d}.npy", moments)
                labels.append([f"00000/img-mean-std-{i:08d}.npy", 0])
        (root / "dataset.json").write_text(json.dumps({"labels": labels}))
        answers = {"vae": str(tmp_path / name), "scale": 0.41} if kind == "dcae" else {
            "vae": str(tmp_path / name), "classes": 1}  # fmt: skip
        output = ShardOutput(tmp_path / f"{kind}-out", shards=1)
        manifest = import_latents(kind, root, output, answers=answers, dtype="float32")
        (shard,) = manifest.shards
        samples = read_shard(tmp_path / f"{kind}-out" / shard.name, manifest)
        latents = model_latents([s.array for s in samples], manifest, keyed_generator(0))
        found = autoencoder_of(manifest.latent_spec).decode(latents)
        order = [int(s.key) for s in samples]
        levels = wanted[order].clamp(0, 1).permute(0, 2, 3, 1) * 255
        assert (found - levels).abs().max() <= 0.52, kind


@pytest.mark.parametrize("kind", CASES)
def test_what_a_format_leaves_open_must_be_said(tmp_path, kind):
    CASES[kind][0](tmp_path / "in")
    for flag in [*(set(CASES[kind][1]) - {"shift"}), "vae"]:
        message = rf"--format {kind} do not say everything; give --{flag} \("
        with pytest.raises(UserError, match=message):
            run(kind, tmp_path / "in", tmp_path / "out", answers={flag: None})
    assert not (tmp_path / "out").exists()


def test_edm2_and_repa_differ_in_the_pixels(tmp_path):
    mean_std(tmp_path / "in")
    assert run("edm2", tmp_path / "in", tmp_path / "a").pixel_range == (0, 1)
    assert run("repa", tmp_path / "in", tmp_path / "b").pixel_range == (-1, 1)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_file_is_read_as_its_folder(tmp_path, compression):
    """EDM2's dataset tool stores the members, a zip command compresses them."""
    mean_std(tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "in.zip", "w", compression) as archive:
        for file in (tmp_path / "in").rglob("*.*"):
            archive.write(file, file.relative_to(tmp_path / "in"))
    for kind in ("edm2", "repa"):
        run(kind, tmp_path / "in", tmp_path / f"{kind}-folder")
        manifest = run(kind, tmp_path / "in.zip", tmp_path / f"{kind}-zip")
        assert members(tmp_path / f"{kind}-zip") == members(tmp_path / f"{kind}-folder")
        assert manifest.samples == N
    with pytest.raises(UserError, match=r"in\.zip is not a folder"):
        run("mar", tmp_path / "in.zip", tmp_path / "out")
    raw = (tmp_path / "in.zip").read_bytes()
    place = raw.index(b"\x93NUMPY") if compression == zipfile.ZIP_STORED else len(raw) // 2
    (tmp_path / "torn.zip").write_bytes(raw[: place + 200] + bytes(8) + raw[place + 208 :])
    with pytest.raises(UserError, match=r"--max-bad allows.*img-mean-std-\d+\.npy: ValueError: "):
        run("edm2", tmp_path / "torn.zip", tmp_path / "out")


def test_a_compressed_tar_is_read_as_the_plain_one(tmp_path):
    webdataset(tmp_path / "in")
    run("webdataset", tmp_path / "in", tmp_path / "plain")
    tar = tmp_path / "in/1.tar"
    (tmp_path / "in/1.tar.xz").write_bytes(lzma.compress(tar.read_bytes()))
    tar.unlink()
    manifest = run("webdataset", tmp_path / "in", tmp_path / "out")
    assert manifest.samples == N
    assert members(tmp_path / "out") == members(tmp_path / "plain")
    assert not (tmp_path / "out/.unpacked").exists()
    (tmp_path / "in/1.tar.xz").write_bytes(lzma.compress(b"no tar" * 100))
    with pytest.raises(UserError, match=r"1\.tar\.xz cannot be read: .*copy it again"):
        run("webdataset", tmp_path / "in", tmp_path / "other")


@pytest.mark.parametrize("kind", CASES)
def test_another_formats_folder_is_refused(tmp_path, kind):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("?")
    message = "contains no files of|gives no labels|statistics|0 folders"
    with pytest.raises(UserError, match=message):
        run(kind, tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match="nowhere does not exist"):
        run(kind, tmp_path / "nowhere", tmp_path / "out")


def test_numbers_that_do_not_fit_are_refused(tmp_path):
    mar(tmp_path / "in")
    for flag, value, message in [
        ("scale", [1.0, 2.0], "scale has 2 numbers for 4 channels"),
        ("scale", 0.0, "scale contains a zero"),
        ("classes", 7, "class_names has 3 names, classes is 7"),
        ("pixel_range", [1.0, 0.0], "pixel_range"),
    ]:
        with pytest.raises(UserError, match=message):
            run("mar", tmp_path / "in", tmp_path / "out", answers={flag: value})
    assert not (tmp_path / "out").exists()


def test_a_drawn_sample_is_not_taken_for_moments(tmp_path):
    (tmp_path / "in/a").mkdir(parents=True)
    np.savez(tmp_path / "in/a/b.npz", moments=MEANS[0][:3], moments_flip=MEANS[0][:3])
    with pytest.raises(UserError, match=r"a/b\.npz has shape \(3, 3, 3\).*another --format"):
        run("mar", tmp_path / "in", tmp_path / "out")


def damage_missing(root):
    next(root.glob("*_labels/3.npy")).unlink()


def damage_garbage(root):
    next(root.glob("*_features/3.npy")).write_bytes(b"\x93NUMPY\x01\x00garbage")


def damage_empty(root):
    next(root.glob("*_features/3.npy")).write_bytes(b"")


def damage_nan(root):
    np.save(next(root.glob("*_features/3.npy")), np.full((1, *SHAPE), np.nan))


def damage_shape(root):
    np.save(next(root.glob("*_features/3.npy")), np.zeros((1, 4, 2, 2)))


def damage_pickle(root):
    np.save(next(root.glob("*_features/3.npy")), np.array([{}]), allow_pickle=True)


@pytest.mark.parametrize(
    "damage",
    [damage_missing, damage_garbage, damage_empty, damage_nan, damage_shape, damage_pickle],
)
def test_a_bad_file_is_skipped_and_listed_or_refused(tmp_path, damage):
    fast_dit(tmp_path / "in")
    damage(tmp_path / "in")
    with pytest.raises(UserError, match=r"than --max-bad allows.*3\.npy: "):
        run("fast-dit", tmp_path / "in", tmp_path / "out")
    manifest = run("fast-dit", tmp_path / "in", tmp_path / "out", max_bad=1)
    assert manifest.samples == N - 1
    assert manifest.skipped[0].startswith("3.npy: ")


def test_a_label_outside_the_classes_is_refused(tmp_path):
    fast_dit(tmp_path / "in")
    with pytest.raises(UserError, match=r"label 4 is outside the classes 0\.\.2"):
        run("fast-dit", tmp_path / "in", tmp_path / "out", answers={"classes": 3})


@pytest.mark.parametrize(
    ("kind", "name"),
    [("lightningdit", "latents_rank00_shard001.safetensors"), ("webdataset", "1.tar")],
)
def test_a_torn_container_is_named(tmp_path, kind, name):
    CASES[kind][0](tmp_path / "in")
    file = tmp_path / "in" / name
    file.write_bytes(file.read_bytes()[:1500])
    with pytest.raises(UserError, match=rf"{name} cannot be read"):
        run(kind, tmp_path / "in", tmp_path / "out")


@pytest.mark.slow
def test_the_command_explains_what_is_missing(tmp_path, tool):
    mar(tmp_path / "in")
    arguments = ["--format", "mar", "--latents", tmp_path / "in", "--out", tmp_path / "out"]
    refused = tool("import_latents", *arguments, "--vae", "x/y")
    assert refused.returncode == 2
    assert "give --scale (--help explains them)" in refused.stderr
    done = tool("import_latents", *arguments, "--vae", "x/y", "--scale", 0.18215)
    assert f"{tmp_path}/out: {N} samples of 3 classes in 12 shards" in done.stdout, done.stderr
