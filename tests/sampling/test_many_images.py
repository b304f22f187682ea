"""Many samples: exactly those asked for, the same on any ranks, to go on with after a kill."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffmoe import work
from diffmoe.capacity.thresholds import CapacityChoice
from diffmoe.data.autoencoders import PixelAutoencoder
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.files import temporary_name
from diffmoe.models.routing_mode import RoutingMode
from diffmoe.parallel.topology import create_topology
from diffmoe.sampling import many_images
from diffmoe.sampling.formats import write_adm, write_png
from diffmoe.sampling.images import dopri5_note, grid
from diffmoe.sampling.many_images import SampleRequest, shard_arrays
from diffmoe.sampling.sampler import Sampler
from diffmoe.work import Ranks
from tests.helpers.networks import network_of
from tests.helpers.processes import killed
from tests.helpers.ranks import run_ranks
from tests.helpers.samples import ORDER, RGB, SETTINGS, Live, Other, images_of, make
from tests.helpers.tiny import tiny_config


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """As uint8, but for rare steps of one level: products of other row counts round differently."""
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "whole"
    assert make(folder) is not None
    return folder


def test_exactly_the_number_asked_for_with_balanced_labels(whole):
    files = sorted(path.name for path in whole.glob("*.npz"))
    assert files == [f"samples-00000{part}.npz" for part in range(3)]
    arrays = [dict(np.load(whole / file)) for file in files]
    assert [len(part["images"]) for part in arrays] == [4, 4, 3]
    assert np.concatenate([part["indices"] for part in arrays]).tolist() == list(range(11))
    labels = np.concatenate([part["labels"] for part in arrays]).tolist()
    assert labels == [k % 5 for k in range(11)]
    assert images_of(whole).dtype == np.uint8
    assert images_of(whole).shape == (11, 8, 8, 3)
    assert images_of(whole).std() > 10


def test_the_manifest_says_what_made_them(whole):
    manifest = json.loads((whole / "samples.json").read_text())
    assert manifest["number"] == 11
    assert manifest["steps"] == 3
    assert manifest["seed"] == 2
    assert manifest["model"] == {"sha256": "a"}
    assert manifest["image_shape"] == [8, 8, 3]
    made = make(whole)  # nothing left to do
    assert made.manifest == manifest
    assert made.capacity.times.tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    assert made.capacity.tokens.tolist() == [11 * 2 * 16] * 3  # with and without the label
    assert manifest["capacity_average"] == pytest.approx(made.capacity.average)
    assert 0.5 < made.capacity.average < 3


def _make_on_a_rank(folder: Path, expert_parallel: int):
    import torch.distributed as dist

    topology = create_topology(expert_parallel) if expert_parallel > 1 else None
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    return make(folder, topology=topology, batch=3, ranks=ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "expert_parallel"), [(2, 1), (2, 2), (4, 2)])
def test_any_ranks_make_the_same_images(whole, tmp_path, world: int, expert_parallel: int):
    folder = tmp_path / "out"
    made = run_ranks(world, _make_on_a_rank, folder, expert_parallel)
    assert [one.closes for one in made if one is not None].count(True) == 1
    assert_same(images_of(folder), images_of(whole))
    ours, theirs = (json.loads((path / "samples.json").read_text()) for path in (folder, whole))
    assert ours["capacity_average"] == pytest.approx(theirs["capacity_average"], rel=0.05)


def test_random_labels_are_keyed_by_the_image():
    order = SampleRequest(1000, (1, 3), "random")
    labels = [order.label(k, seed=7) for k in range(1000)]
    assert labels == [order.label(k, seed=7) for k in range(1000)]
    assert labels != [order.label(k, seed=8) for k in range(1000)]
    assert set(labels) == {1, 3}
    assert 430 < labels.count(1) < 570


# While a shard is written, between it and its record, in a record, before the manifest.
@pytest.mark.parametrize(
    ("module", "name", "at"),
    [
        (np, "savez", 2),
        (many_images, "sha256_of", 2),
        (work, "write_json", 3),
        (many_images, "_finish", 1),
        (Sampler, "_images", 3),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_killed_command_goes_on_without_gaps_or_duplicates(whole, tmp_path, module, name, at):
    folder = tmp_path / "out"
    assert killed(lambda: make(folder), module, name, at)
    assert not (folder / "samples.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob(".sampling/0*.json")}
    make(folder)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert np.array_equal(images_of(folder), images_of(whole))  # same batches: bit for bit
    assert sorted(path.name for path in folder.glob("*")) == [
        ".sampling",
        *(f"samples-00000{part}.npz" for part in range(3)),
        "samples.json",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": SamplingSettings(steps=4, guidance=1.5, seed=2)}, "steps: 3 there, 4 now"),
        ({"order": SampleRequest(12, (0, 1, 2, 3, 4))}, "number: 11 there, 12 now"),
        (
            {"order": SampleRequest(11, (0, 1, 2, 3, 4), "random")},
            "labels: balanced there, random now",
        ),
        ({"model": Other}, "model: .*'a'.* there, .*'b'.* now"),
    ],
)
def test_a_folder_of_other_settings_is_refused(whole, change, message):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        make(whole, **change)
    assert before == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}


def test_a_stop_costs_fifty_images_unless_the_folder_was_begun_otherwise(tmp_path):
    order = SampleRequest(120, (0, 1))
    short = SamplingSettings(steps=1, guidance=1.0)
    made = make(tmp_path / "new", order=order, settings=short, shard_size=None, batch=60)
    assert [shard["samples"] for shard in made.manifest["shards"]] == [50, 50, 20]
    make(tmp_path / "old", order=order, settings=short, shard_size=80, batch=60)
    made = make(tmp_path / "old", order=order, settings=short, shard_size=None, batch=60)
    assert [shard["samples"] for shard in made.manifest["shards"]] == [80, 40]


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"")
    with pytest.raises(UserError, match="holds files, but was not begun by this command"):
        make(tmp_path)


def test_another_rank_that_tries_whether_it_can_write_is_no_stranger(whole, tmp_path):
    probe = temporary_name(tmp_path / "probe")
    probe.touch()
    make(tmp_path)
    assert np.array_equal(images_of(tmp_path), images_of(whole))


def test_a_shard_that_vanished_is_made_again(whole, tmp_path):
    folder = tmp_path / "out"
    make(folder)
    (folder / "samples-000001.npz").unlink()
    with pytest.raises(UserError, match=r"samples-000001\.npz is missing or damaged"):
        list(shard_arrays(folder))
    make(folder)
    assert np.array_equal(images_of(folder), images_of(whole))


def test_a_truncated_shard_is_made_again_and_the_manifest_follows(whole, tmp_path):
    folder = tmp_path / "out"
    make(folder)
    file = folder / "samples-000001.npz"
    file.write_bytes(file.read_bytes()[:100])
    assert make(folder, batch=3) is not None
    assert_same(images_of(folder), images_of(whole))  # their checksums are the new ones


def test_where_an_image_depends_on_its_batch_the_batch_may_not_change(tmp_path):
    choice = CapacityChoice(RoutingMode("pooled"))
    sampler = Live(network_of(RGB), RGB, PixelAutoencoder(), choice=choice)

    def run(batch: int) -> None:
        sampler.folder(tmp_path / "out", ORDER, SETTINGS, batch=batch, shard_size=4)

    run(4)
    with pytest.raises(UserError, match="batch: 4 there, 2 now"):
        run(2)


def test_a_refused_command_does_not_claim_the_folder(tmp_path):
    for order, settings in (
        (SampleRequest(4, (99,)), SETTINGS),
        (ORDER, SamplingSettings(steps=0)),
        (ORDER, SamplingSettings(guided_channels=7)),
    ):
        with pytest.raises(UserError):
            make(tmp_path / "out", order=order, settings=settings)
        assert not (tmp_path / "out").exists()


def test_a_damaged_or_unfinished_folder_is_not_read(tmp_path):
    folder = tmp_path / "out"
    killed(lambda: make(folder), np, "savez", 2)
    with pytest.raises(UserError, match="not all samples are there"):
        list(shard_arrays(folder))
    make(folder)
    file = folder / "samples-000002.npz"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match=r"samples-000002\.npz is missing or damaged"):
        list(shard_arrays(folder, check=True))


def test_adm_and_png_hold_the_same_images(whole):
    adm = write_adm(whole, 11, (8, 8, 3))
    assert adm.name == "samples_11x8x8x3.npz"
    arrays = np.load(adm)
    assert np.array_equal(arrays["arr_0"], images_of(whole))
    assert arrays["arr_1"].tolist() == [k % 5 for k in range(11)]
    png = write_png(whole)
    stored = [np.asarray(Image.open(path)) for path in sorted(png.glob("*.png"))]
    assert np.array_equal(np.stack(stored), images_of(whole))
    adm.unlink()
    for path in png.glob("*"):
        path.unlink()
    png.rmdir()


def test_gray_images_have_no_adm_format(tmp_path):
    gray = tiny_config(model__in_channels=1)
    make(tmp_path / "gray", config=gray)
    with pytest.raises(UserError, match=r"RGB images, these have 1 channel"):
        write_adm(tmp_path / "gray", 11, (8, 8, 1))
    files = sorted(write_png(tmp_path / "gray").glob("*.png"))
    with Image.open(files[0]) as image:
        assert image.mode == "L"


def test_uint8_is_rounded_and_clamped():
    pixels = torch.tensor([-2.0, -1, -0.999, 0, 1 / 255, 0.5, 1, 3]).view(1, 1, 1, 8)
    # round(127.5 x + 127.5): halves go to the even neighbor.
    assert PixelAutoencoder().decode(pixels).flatten().tolist() == [
        0,
        0,
        0,
        128,
        128,
        191,
        255,
        255,
    ]


def test_a_grid_fills_row_by_row():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 2, 3, 1)
    picture = np.asarray(grid(images, 2))
    assert picture.shape == (6, 6)
    assert picture[::2, ::3].tolist() == [[0, 1], [2, 3], [4, 0]]


def test_a_dense_model_has_no_capacity(tmp_path):
    made = make(tmp_path / "dense", config=tiny_config(moe__type="dense"))
    assert made.capacity is None
    assert made.manifest["capacity_average"] is None


def test_nothing_to_make_is_refused(tmp_path):
    with pytest.raises(UserError, match="0 images"):
        make(tmp_path / "none", order=SampleRequest(0, (0,)))
    assert not (tmp_path / "none").exists()


def test_dopri5_tells_how_many_evaluations_it_took(tmp_path):
    pytest.importorskip("torchdiffeq")
    network, passes = network_of(RGB), []
    network.register_forward_pre_hook(lambda *_: passes.append(None))
    settings = SamplingSettings(sampler="dopri5", guidance=1.5)
    sampler = Live(network, RGB, PixelAutoencoder())
    made = sampler.folder(
        tmp_path / "out", SampleRequest(3, (0, 1)), settings, batch=2, shard_size=3
    )
    found = made.manifest["evaluations"]  # of two batches, guided: two passes each
    assert found == len(passes) / 2 / 2
    assert found > 20
    assert dopri5_note(found).startswith(f"dopri5 took {found:.0f} evaluations a batch")
    assert "evaluations" not in make(tmp_path / "euler").manifest


def test_images_that_are_no_numbers_are_not_written(tmp_path):
    network = network_of(RGB)
    network.final.bias.data.fill_(torch.nan)
    with pytest.raises(UserError, match="image 0 is not made of finite numbers"):
        Live(network, RGB, PixelAutoencoder()).folder(tmp_path / "out", ORDER, SETTINGS)
    assert not list((tmp_path / "out").glob("samples*"))
