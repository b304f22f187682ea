"""Features of images beside their samples: exact, of both views, resumable, on any ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffmoe import work
from diffmoe.data.fetching import open_shard
from diffmoe.data.manifest import FeatureContent, Manifest
from diffmoe.data.packing import ShardWriter
from diffmoe.data.reading import OpenShard
from diffmoe.errors import UserError
from diffmoe.prepare import image_features
from diffmoe.prepare.checking import check_data
from diffmoe.prepare.image_features import encode_features
from diffmoe.prepare.resharding import hold_out, reshard
from diffmoe.prepare.sharding import ShardOutput
from diffmoe.work import Ranks
from tests.helpers.processes import killed
from tests.helpers.shards import FIELDS, members
from tests.helpers.tools import tool

SAMPLES = 11


class Corners:
    """The image's four quarters, each as its mean color."""

    name, layer, checksum = "corners", "last", "0123456789abcdef"

    def __call__(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return torch.nn.functional.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float(), 2)


def pixels(sample: int) -> np.ndarray:
    return np.random.default_rng(sample).integers(0, 256, (1, 4, 4), np.uint8)


def quarters(image: np.ndarray) -> np.ndarray:
    """(1,4,4) to the three equal channels of its quarters' means."""
    means = image.astype(float).reshape(1, 2, 2, 2, 2).mean((2, 4))
    return np.repeat(means, 3, axis=0).astype(np.float16)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Gray pixels, mirrored on reading."""
    folder = tmp_path_factory.mktemp("packed") / "data"
    fields = {**FIELDS, "shape": (1, 4, 4), "dtype": "uint8"}
    fields |= {"flips": True, "mirrored": "on_reading"}
    with ShardWriter(folder, [6, 5], **fields) as writer:
        for i in range(SAMPLES):
            writer.add(f"{i:05d}", i % 7, pixels(i))
    return folder


def features_in(folder: Path) -> dict[str, list[np.ndarray]]:
    manifest = Manifest.load(folder)
    found = {}
    for shard in manifest.shards:
        address = manifest.address(folder, shard)
        opened = OpenShard(open_shard(address, shard, attempts=1), shard, manifest, address)
        for index, key in enumerate(opened.keys):
            found[key] = [opened.features(index, view) for view in (False, True)]
        opened.close()
    return found


def test_each_view_has_its_own_features(packed: Path, tmp_path: Path):
    manifest = encode_features(packed, ShardOutput(tmp_path), Corners(), batch=4)
    assert manifest.features == FeatureContent(
        encoder="corners", layer="last", checksum="0123456789abcdef", shape=(3, 2, 2)
    )
    found = features_in(tmp_path)
    assert len(found) == SAMPLES
    for i in range(SAMPLES):
        plain, mirrored = found[f"{i:05d}"]
        np.testing.assert_array_equal(plain, quarters(pixels(i)))
        np.testing.assert_array_equal(mirrored, quarters(pixels(i)[..., ::-1]))
    report = str(check_data(tmp_path, None))
    assert "features of corners, last: 3 channels on 2x2" in report
    assert "no problems" in report


def test_of_stored_moments_the_means_are_seen(tmp_path: Path):
    """Unscaled, with a stored mirror image that is not the array turned."""

    def array(sample: int) -> np.ndarray:
        mean = pixels(sample).astype(np.float32) / 127.5 - 1
        return np.concatenate([mean * 0.5 + 0.1, np.full_like(mean, 5)])

    fields = {**FIELDS, "shape": (1, 4, 4), "content": "mean_logvar", "flips": True}
    fields |= {"scaled": False, "shift": 0.1, "scale": 2.0}
    with ShardWriter(tmp_path / "data", 3, **fields) as writer:
        for i in range(3):
            writer.add(f"{i}", 0, array(i), array(i + 100))
    encode_features(tmp_path / "data", ShardOutput(tmp_path / "out"), Corners())
    for key, (plain, mirrored) in features_in(tmp_path / "out").items():
        # The decoder undoes scale and shift: what is seen is the mean itself, but for rounding.
        for sample, own in ((int(key), plain), (int(key) + 100, mirrored)):
            image = (array(sample)[:1] * 127.5 + 127.5).round().clip(0, 255)
            np.testing.assert_allclose(own, quarters(image), rtol=0, atol=0.3)


def test_any_number_of_ranks_gives_the_same_shards(packed: Path, tmp_path: Path):
    encode_features(packed, ShardOutput(tmp_path / "one"), Corners(), batch=4)
    done = [
        encode_features(
            packed, ShardOutput(tmp_path / "two", ranks=Ranks(r, 2)), Corners(), batch=4
        )
        for r in (1, 0)
    ]
    assert [manifest is None for manifest in done] == [True, False]
    assert members(tmp_path / "two") == members(tmp_path / "one")


@pytest.mark.parametrize(("name", "moment"), [("_mirrored", 8), ("write_json", 2)])
def test_a_killed_work_goes_on_to_the_same_bytes(packed, tmp_path, name, moment):
    encode_features(packed, ShardOutput(tmp_path / "whole"), Corners(), batch=4)
    out, module = tmp_path / "out", work if name == "write_json" else image_features
    assert killed(
        lambda: encode_features(packed, ShardOutput(out), Corners(), batch=4), module, name, moment
    )
    assert not (out / "manifest.json").exists()
    encode_features(packed, ShardOutput(out), Corners(), batch=4)
    assert members(out) == members(tmp_path / "whole")


def test_features_go_where_their_samples_go(packed: Path, tmp_path: Path):
    encode_features(packed, ShardOutput(tmp_path / "a"), Corners())
    whole = features_in(tmp_path / "a")
    reshard(tmp_path / "a", ShardOutput(tmp_path / "b", shards=4))
    hold_out(tmp_path / "a", 3, ShardOutput(tmp_path / "c"), ShardOutput(tmp_path / "d"))
    parts = features_in(tmp_path / "c") | features_in(tmp_path / "d")
    for found in (features_in(tmp_path / "b"), parts):
        assert found.keys() == whole.keys()
        for key, views in whole.items():
            assert [view.tobytes() for view in found[key]] == [view.tobytes() for view in views]


def test_numbers_that_are_no_float16_are_refused(packed: Path, tmp_path: Path):
    class Large(Corners):
        def __call__(self, images: Tensor) -> Tensor:
            return super().__call__(images) * 1e6

    with pytest.raises(UserError, match=r"sample \d+: features.npy: it contains NaN or infinity"):
        encode_features(packed, ShardOutput(tmp_path), Large())


def test_the_command(packed: Path, tmp_path: Path):
    words = ("--encoder", "efficientnet_lite0@32", "--device", "cpu")
    done = tool("encode_features", packed, tmp_path / "out", *words)
    assert "features of efficientnet_lite0@32, block 11: 112 on 2x2" in done.stdout, done.stderr
    assert "to align with them: align.block=BLOCK align.width=112" in done.stdout
    views = features_in(tmp_path / "out")["00003"]
    assert not np.array_equal(*views)
    wrong = tool("encode_features", packed, tmp_path / "out", *words, "--layer", "3")
    assert wrong.returncode == 2
    assert "begun with other settings" in wrong.stderr
