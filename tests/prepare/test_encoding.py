import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffmoe import work
from diffmoe.data.autoencoders import DiffusersAutoencoder, PixelAutoencoder, to_uint8
from diffmoe.data.latents import from_stored
from diffmoe.data.manifest import Manifest
from diffmoe.data.reading import read_shard
from diffmoe.errors import UserError
from diffmoe.prepare import encoding, sharding
from diffmoe.prepare.image_folders import find_images, load_image
from diffmoe.prepare.sharding import default_shards
from diffmoe.work import Ranks
from tests.helpers.encoding import encode
from tests.helpers.processes import killed
from tests.helpers.shards import members


def pack_pixels(photos, out, **options):
    return encode(photos, out, **{"vae": None, "size": 16, "shards": 4, "batch": 3, **options})


def samples_of(directory, manifest):
    return {
        sample.key: sample
        for shard in manifest.shards
        for sample in read_shard(directory / shard.name, manifest)
    }


def test_pixels_come_back_exactly_with_their_mirror_images(photos, tmp_path):
    manifest = pack_pixels(photos, tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert [shard.samples for shard in manifest.shards] == [8, 8, 7, 7]
    assert (manifest.classes, manifest.class_names) == (3, ["Ant", "bee 2.0", "cat"])
    assert manifest.skipped == []
    samples = samples_of(tmp_path, manifest)
    for item in find_images(photos)[0]:
        sample, pixels = samples[item.key], load_image(item, 16)
        assert sample.label == item.label
        for array, wanted in [(sample.array, pixels), (sample.flip, pixels[:, ::-1])]:
            values = torch.from_numpy(from_stored(array, "uint8"))
            (image,) = PixelAutoencoder().decode(values[None])
            assert np.array_equal(image, wanted)


def test_shards_mix_the_classes(photos, tmp_path):
    manifest = pack_pixels(photos, tmp_path)
    for shard in manifest.shards:
        assert len({sample.label for sample in read_shard(tmp_path / shard.name, manifest)}) == 3


@pytest.mark.parametrize(
    ("dtype", "error"), [("float16", 2e-3), ("bfloat16", 1e-2), ("float32", 0)]
)
def test_moments_are_the_autoencoders_own(photos, tmp_path, tiny_vae, dtype, error):
    manifest = pack_pixels(photos, tmp_path, vae=str(tiny_vae), dtype=dtype)
    assert (manifest.content, manifest.scaled, manifest.dtype) == ("mean_logvar", False, dtype)
    assert (manifest.scale, manifest.shift) == (0.5, 0.25)  # of the autoencoder's config
    assert manifest.autoencoder == str(tiny_vae)
    assert manifest.shape == (4, 8, 8)
    model = DiffusersAutoencoder(str(tiny_vae)).model
    samples = samples_of(tmp_path, manifest)
    for item in find_images(photos)[0][::7]:
        pixels = torch.from_numpy(load_image(item, 16).copy()).permute(2, 0, 1)[None]
        own = samples[item.key]
        for x, array in [(pixels, own.array), (pixels.flip(3), own.flip)]:
            posterior = model.encode(x / 127.5 - 1).latent_dist
            wanted = torch.cat([posterior.mean, posterior.logvar], 1)[0]
            assert torch.allclose(
                torch.from_numpy(from_stored(array, dtype)), wanted, rtol=error, atol=error + 1e-5
            )
        # The flip of a latent is not the latent of the flip.
        array, flip = (
            from_stored(a, dtype) for a in (samples[item.key].array, samples[item.key].flip)
        )
        assert not np.allclose(flip, array[..., ::-1], atol=0.05)


@torch.no_grad()
def test_what_the_autoencoder_loses_is_told_before_the_work(photos, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "vae")
    told = []
    options = {"vae": str(tmp_path / "vae"), "dtype": "float32", "report": told.append}
    pack_pixels(photos, tmp_path / "out", **options)
    images = np.stack([load_image(item, 16) for item in find_images(photos)[0][::2]])
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    back = (model.decode(model.encode(x).latents).sample.clamp(-1, 1) + 1) * 127.5
    errors = (back.permute(0, 2, 3, 1).round() - torch.from_numpy(images)).pow(2).mean((1, 2, 3))
    wanted = (20 * np.log10(255) - 10 * errors.log10()).mean()
    assert told == [f"PSNR of 15 images through the autoencoder and back: {wanted:.1f} dB"]
    pack_pixels(photos, tmp_path / "out", **options)  # there is nothing left to do
    assert len(told) == 1


def test_a_config_with_latent_statistics_gives_them_per_channel(monkeypatch, tiny_vae):
    class Config(dict):
        __getattr__ = dict.__getitem__

    config = Config(scaling_factor=0.5, latents_mean=[1, 2, 3, 4], latents_std=[1.0, 2.0, 0.5, 1.0])
    monkeypatch.setattr(
        DiffusersAutoencoder, "__init__", lambda self, *_, **__: setattr(self, "model", fake)
    )
    fake = SimpleNamespace(config=config)
    autoencoder = DiffusersAutoencoder.with_own_scale("x")
    assert autoencoder.shift == [1, 2, 3, 4]
    assert autoencoder.scale == [0.5, 0.25, 1.0, 0.5]


def test_any_number_of_ranks_gives_the_same_shards(photos, tmp_path):
    pack_pixels(photos, tmp_path / "one")
    # The last rank first; only the rank that completes the folder has the manifest.
    done = [pack_pixels(photos, tmp_path / "three", ranks=Ranks(rank, 3)) for rank in (2, 0, 1)]
    assert [manifest is None for manifest in done] == [True, True, False]
    assert members(tmp_path / "three") == members(tmp_path / "one")
    assert Manifest.load(tmp_path / "three") == Manifest.load(tmp_path / "one")


def test_ranks_come_from_torchrun_or_srun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.of_environment() == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "8")  # of the job: a batch script is not srun
    assert Ranks.of_environment() == (0, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert Ranks.of_environment() == (3, 8)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Ranks.of_environment() == (1, 2)


# In a shard's middle, between a tar's name and its record, between the records and the manifest.
@pytest.mark.parametrize(
    ("name", "moments"),
    [("to_stored", [1, 2, 15, 25]), ("write_json", [1, 2, 4, 5]), ("_finish", [1])],
)
def test_a_killed_packing_goes_on_to_the_same_bytes(photos, tmp_path, name, moments):
    pack_pixels(photos, tmp_path / "whole", workers=1)
    module = {"to_stored": encoding, "write_json": work}.get(name, sharding)
    for moment in moments:
        out = tmp_path / f"{name}-{moment}"
        assert killed(lambda out=out: pack_pixels(photos, out, workers=1), module, name, moment)
        assert not (out / "manifest.json").exists()
        finished = {record.stem for record in out.glob(".packing/0*.json")}
        times = {tar.stem: tar.stat().st_mtime_ns for tar in out.glob("*.tar")}
        # A second kill on the way, by another process count.
        killed(
            lambda out=out: pack_pixels(photos, out, workers=1, ranks=Ranks(0, 2)), module, name, 1
        )
        manifest = pack_pixels(photos, out)
        assert manifest == Manifest.load(tmp_path / "whole").model_copy(
            update={"source": manifest.source}
        )
        assert members(out) == members(tmp_path / "whole")
        for shard in finished:  # kept, not made again
            assert (out / f"{shard}.tar").stat().st_mtime_ns == times[shard]
        assert list(out.glob("*.tmp")) == []


def test_a_finished_folder_stays_as_it_is(photos, tmp_path):
    manifest = pack_pixels(photos, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert pack_pixels(photos, tmp_path) == manifest
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


def test_other_settings_do_not_mix_with_a_begun_folder(photos, tmp_path):
    pack_pixels(photos, tmp_path / "out")
    with pytest.raises(UserError, match=r"shape: \[3, 16, 16\] there, \[3, 8, 8\] now"):
        pack_pixels(photos, tmp_path / "out", size=8)
    with pytest.raises(UserError, match="number of shards: 4 there, 5 now"):
        pack_pixels(photos, tmp_path / "out", shards=5)
    shutil.copytree(photos, tmp_path / "fewer")
    next((tmp_path / "fewer" / "cat").glob("*.jpg")).unlink()
    with pytest.raises(UserError, match="items: 30 there, 29 now"):
        pack_pixels(tmp_path / "fewer", tmp_path / "out")
    with pytest.raises(UserError, match="with 2 ranks"):
        pack_pixels(photos, tmp_path / "out", overwrite=True, ranks=Ranks(0, 2))
    manifest = pack_pixels(photos, tmp_path / "out", size=8, shards=2, overwrite=True)
    assert sorted(members(tmp_path / "out")) == ["000000.tar", "000001.tar"]
    assert manifest.shape == (3, 8, 8)
    shutil.rmtree(tmp_path / "out" / ".packing")  # a folder of another tool
    with pytest.raises(UserError, match=r"already holds manifest\.json"):
        pack_pixels(photos, tmp_path / "out")


@pytest.fixture
def damaged(photos, tmp_path):
    """The photographs, six of them unreadable in as many ways."""
    root = tmp_path / "damaged"
    shutil.copytree(photos, root)
    files = [item.path for item in find_images(root)[0]]
    jpegs = [file for file in files if not file.endswith("png")]
    png = next(file for file in files if file.endswith("png"))
    with open(jpegs[0], "r+b") as stream:
        stream.truncate(300)
    Path(jpegs[3]).write_bytes(b"")
    Path(jpegs[6]).write_bytes(b"<html>404</html>" * 50)
    content = Path(png).read_bytes()
    Path(png).write_bytes(content[: len(content) // 2])
    Image.new("RGB", (3, 900)).save(jpegs[9])
    os.unlink(jpegs[12])
    os.symlink("/nowhere/at/all.jpg", jpegs[12])
    return root, sorted(os.path.relpath(f, root) for f in [*jpegs[:13:3], png])


def test_undecodable_images_are_skipped_and_listed(damaged, photos, tmp_path):
    root, bad = damaged
    manifest = pack_pixels(root, tmp_path / "out", max_bad=6)
    assert sorted(line.split(": ")[0] for line in manifest.skipped) == bad
    assert manifest.samples == 24
    good = samples_of(tmp_path / "out", manifest)
    pack_pixels(photos, tmp_path / "whole")
    whole = samples_of(tmp_path / "whole", Manifest.load(tmp_path / "whole"))
    assert len(good) == 24
    assert all(np.array_equal(sample.array, whole[key].array) for key, sample in good.items())
    assert "6 skipped" in manifest.summary(tmp_path)


def test_more_bad_images_than_allowed_stop_the_work_but_keep_it(damaged, tmp_path):
    root, _ = damaged
    for allowed in (0, 5):
        with pytest.raises(UserError, match=r"than --max-bad allows.*finished shards are kept"):
            pack_pixels(root, tmp_path / "out", max_bad=allowed)
        assert not (tmp_path / "out" / "manifest.json").exists()
        assert list((tmp_path / "out").glob("*.tmp")) == []
    assert pack_pixels(root, tmp_path / "out", max_bad=6).samples == 24


def test_a_shard_without_any_usable_image_is_left_out(tmp_path, photos):
    root = tmp_path / "images"
    (root / "c").mkdir(parents=True)
    for name in "abc":
        (root / "c" / f"{name}.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match="no item could be used"):
        pack_pixels(root, tmp_path / "none", shards=3, max_bad=3)
    shutil.copy(find_images(photos)[0][0].path, root / "c" / "d.jpg")
    manifest = pack_pixels(root, tmp_path / "out", shards=4, max_bad=3)
    assert [shard.samples for shard in manifest.shards] == [1]
    manifest.check(tmp_path / "out")
    assert sorted(members(tmp_path / "out")) == [manifest.shards[0].name]


def test_sizes_and_classes_that_do_not_fit_are_refused(photos, tmp_path, tiny_vae):
    with pytest.raises(UserError, match="--size 15x15 is not a multiple of 2"):
        pack_pixels(photos, tmp_path / "out", vae=str(tiny_vae), size=15)
    with pytest.raises(UserError, match="--batch 0"):
        pack_pixels(photos, tmp_path / "out", batch=0)
    with pytest.raises(UserError, match=r"--classes 9, but .* has 3 classes"):
        pack_pixels(photos, tmp_path / "out", classes=9)
    with pytest.raises(UserError, match=r"nowhere cannot be loaded"):
        pack_pixels(photos, tmp_path / "out", vae=str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()


def test_what_float16_cannot_hold_is_told(photos, tmp_path, tiny_vae, monkeypatch):
    huge = lambda self, images: torch.full((len(images), 8, 8, 8), 1e5)  # noqa: E731
    monkeypatch.setattr(DiffusersAutoencoder, "encode", huge)
    with pytest.raises(UserError, match="contains NaN or infinity"):
        pack_pixels(photos, tmp_path, vae=str(tiny_vae))
    manifest = pack_pixels(photos, tmp_path, vae=str(tiny_vae), dtype="bfloat16", overwrite=True)
    sample = next(iter(samples_of(tmp_path, manifest).values()))
    assert from_stored(sample.array, "bfloat16").max() == pytest.approx(1e5, rel=0.01)


def test_the_default_number_of_shards_serves_the_lanes():
    assert [default_shards(n) for n in (5, 32, 3000, 32000, 1281167)] == [5, 32, 32, 32, 1282]


@pytest.mark.slow
def test_the_command_on_two_ranks(photos, tmp_path, tool, tiny_vae):
    arguments = ["--images", photos, "--out", tmp_path, "--vae", tiny_vae, "--size", 16]
    arguments += ["--shards", 4, "--device", "cpu"]
    first = tool("encode_latents", *arguments, RANK="0", WORLD_SIZE="2")
    assert first.returncode == 0, first.stderr
    assert "rank 0 of 2 has finished; other ranks are still working" in first.stdout
    second = tool("encode_latents", *arguments, RANK="1", WORLD_SIZE="2")
    assert f"{tmp_path}: 30 samples of 3 classes in 4 shards" in second.stdout, second.stderr
    assert json.loads((tmp_path / "manifest.json").read_text())["content"] == "mean_logvar"
    wrong = tool("encode_latents", *arguments, "--dtype", "bfloat16")
    assert wrong.returncode == 2
    assert "dtype: float16 there, bfloat16 now" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_the_background_is_a_setting_of_the_work(tmp_path, tool):
    """Transparent everywhere: the packed image is the background, and only that."""
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    Image.new("RGBA", (16, 16), (1, 2, 3, 0)).save(root / "a" / "0.png")
    pack_pixels(root, tmp_path / "white", shards=1)
    done = tool(
        *("encode_latents", "--images", root, "--out", tmp_path / "black", "--pixels"),
        *("--size", 16, "--background", "black"),
    )
    assert done.returncode == 0, done.stderr
    for name, level in [("white", 255), ("black", 0)]:
        manifest = Manifest.load(tmp_path / name)
        (sample,) = samples_of(tmp_path / name, manifest).values()
        values = torch.from_numpy(from_stored(sample.array, manifest.dtype))
        assert (to_uint8(values[None]) == level).all()
    message = r"background: \[255, 255, 255\] there, \[9, 9, 9\] now"
    with pytest.raises(UserError, match=message):
        pack_pixels(root, tmp_path / "white", shards=1, background=(9, 9, 9))
