import re

import numpy as np
import pytest
from PIL import Image

from diffmoe.contact_sheet import with_names
from diffmoe.data.manifest import Manifest
from diffmoe.data.packing import ShardWriter
from diffmoe.data.reading import read_shard
from diffmoe.errors import UserError
from diffmoe.prepare.checking import check_data
from diffmoe.prepare.resharding import hold_out, reshard
from diffmoe.prepare.sharding import ShardOutput
from tests.helpers.encoding import encode
from tests.helpers.shards import FIELDS, damage, members, relist

LINES = ["Ant", "Ant, bee 2.0", "bee 2.0, cat", "cat"]  # of eight samples each


def test_good_data_has_no_problems_and_a_sheet(photos, tmp_path):
    encode(photos, tmp_path / "data", vae=None, size=16, shards=3)
    report = check_data(tmp_path / "data", tmp_path / "sheets" / "a.png")
    assert report.problems == []
    text = str(report)
    for part in [
        "30 samples of 3 classes in 3 shards",
        "content sample of 3x16x16 in uint8, flips True (mirrored on reading)",
        "samples per class: 10 to 10",
        "bee 2.0       10 ####",
        "no problems",
    ]:
        assert part in text
    sheet = np.asarray(Image.open(tmp_path / "sheets" / "a.png"))
    named = with_names(Image.new("RGB", (128, 128)), LINES)
    margin = named.width - 128
    assert sheet.shape == (4 * 2 * 16, margin + 8 * 16, 3)  # 30 samples, eight in a line
    assert np.array_equal(sheet[:, :margin], np.asarray(named)[:, :margin])
    sheet = sheet[:, margin:]
    assert np.array_equal(sheet[:16, :16], sheet[16:32, :16][:, ::-1])  # pixels: exactly mirrored


def test_the_statistics_are_those_of_draws(tmp_path):
    """Means of deviation 3, posteriors of deviation 4: together 5, times the scale."""
    rng = np.random.default_rng(0)
    fields = {**FIELDS, "content": "mean_std", "scaled": False, "autoencoder": "some/vae"}
    fields |= {"scale": [0.2, 0.1], "shift": [1.0, -1.0], "classes": 30}
    with ShardWriter(tmp_path, [20, 20], **fields) as writer:
        for i in range(40):
            mean = rng.normal(2, 3, (2, 4, 4))
            moments = np.concatenate([mean, np.full_like(mean, 4)]).astype(np.float32)
            writer.add(f"{i:03d}", i % 30, moments)
    report = check_data(tmp_path, None)
    mean, deviation = (
        [float(x) for x in line.split()[1:]] for line in report.lines if line.startswith("  ")
    )
    assert mean == pytest.approx([0.2, 0.3], abs=0.1)
    assert deviation == pytest.approx([1.0, 0.5], rel=0.1)
    assert "samples per class: 1 to 2, median 1" in str(report)
    assert report.problems == []


@pytest.mark.parametrize(
    ("changes", "low", "high", "message"),
    [
        ({"scale": 1.0}, -5, -4, r"standard deviation is 5.*scale=1\.0 .*looks wrong"),
        ({"scale": 0.18215**2}, -5, -4, "looks wrong"),
        ({"content": "mean_std"}, -5, -4, "are these log-variances"),
        ({}, 0.1, 0.2, "are these standard deviations"),
        ({"scaled": True}, -5, -4, "scaled=True looks wrong"),
    ],
)
def test_wrong_meanings_are_suspected(tmp_path, changes, low, high, message):
    rng = np.random.default_rng(0)
    fields = {"content": "mean_logvar", "scaled": False, "scale": 0.18215, "autoencoder": "vae"}
    with ShardWriter(tmp_path, [30], **{**FIELDS, **fields, **changes}) as writer:
        for i in range(30):
            mean, spread = rng.normal(0, 5, (2, 4, 4)), rng.uniform(low, high, (2, 4, 4))
            writer.add(f"{i:03d}", i % 7, np.concatenate([mean, spread]).astype(np.float32))
    (problem,) = check_data(tmp_path, None).problems
    assert re.search(message, problem), problem


def test_every_kind_of_damage_is_a_problem_and_the_rest_is_still_read(tmp_path, pack):
    pack(tmp_path, [4] * 6)
    for shard, how in enumerate(["missing", "truncated", "empty", "flipped"]):
        damage(tmp_path, shard, how)
    report = check_data(tmp_path, None)
    assert len(report.problems) == 4
    for shard, problem in enumerate(report.problems):
        assert f"{shard:06d}.tar cannot be read" in problem
    assert sum(int(line.split()[1]) for line in report.lines if "#" in line) == 8


def test_bad_samples_are_problems(tmp_path, pack):
    # As a tool that is not ours might have packed them.
    pack(tmp_path, [4, 4])
    (tmp_path / "000001.tar").write_bytes((tmp_path / "000000.tar").read_bytes())
    relist(tmp_path)
    problems = check_data(tmp_path, None).problems
    assert problems[0] == "sample key 00000 is in 000000.tar and again in 000001.tar"
    assert len(problems) == 4
    content = (tmp_path / "000000.tar").read_bytes()
    first = np.float32(1).tobytes()  # sample 1 begins with 1.0
    content = content.replace(first, np.float32(np.nan).tobytes())
    (tmp_path / "000000.tar").write_bytes(content)
    relist(tmp_path)
    problems = check_data(tmp_path, None).problems
    assert any("sample 00001: NaN or infinity in the data" in problem for problem in problems)
    manifest = Manifest.load(tmp_path)
    manifest.classes = 2
    manifest.save(tmp_path)
    assert all("label 2 is outside" in p for p in check_data(tmp_path, None).problems)


def test_moments_are_decoded_onto_the_sheet(photos, tmp_path, tiny_vae):
    encode(photos, tmp_path, vae=str(tiny_vae), size=16, shards=2)
    report = check_data(tmp_path, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))[:, -8 * 16 :]
    assert sheet.shape == (4 * 2 * 16, 8 * 16, 3)
    assert "contact sheet" in str(report)


def test_without_an_autoencoder_the_sheet_is_left_out(tmp_path, pack):
    pack(tmp_path, [8], autoencoder=str(tmp_path / "nowhere"))
    report = check_data(tmp_path, tmp_path / "sheet.png")
    assert "no contact sheet: the autoencoder" in str(report)
    assert not (tmp_path / "sheet.png").exists()


def every_sample(directory):
    manifest = Manifest.load(directory)
    samples = [s for shard in manifest.shards for s in read_shard(directory / shard.name, manifest)]
    return {
        s.key: (s.label, s.array.tobytes(), None if s.flip is None else s.flip.tobytes())
        for s in samples
    }


@pytest.mark.parametrize("flips", [True, False])
def test_resharding_keeps_every_sample(tmp_path, pack, flips):
    manifest = pack(tmp_path / "a", [5, 9, 2], flips=flips, content="mean_std", scale=0.5)
    manifest.skipped = ["x.jpg: broken"]
    manifest.save(tmp_path / "a")
    made = reshard(tmp_path / "a", ShardOutput(tmp_path / "b", shards=5))
    assert [shard.samples for shard in made.shards] == [4, 3, 3, 3, 3]
    assert every_sample(tmp_path / "a") == every_sample(tmp_path / "b")
    assert made.model_copy(update={"shards": []}) == manifest.model_copy(update={"shards": []})
    assert Manifest.load(tmp_path / "b") == made
    reshard(tmp_path / "a", ShardOutput(tmp_path / "c", shards=5))
    assert members(tmp_path / "b") == members(tmp_path / "c")


def test_resharding_refuses_what_it_cannot_do(tmp_path, pack):
    pack(tmp_path, [5, 4])
    with pytest.raises(UserError, match="choose another"):
        reshard(tmp_path, ShardOutput(tmp_path / ".." / tmp_path.name, shards=3))
    with pytest.raises(UserError, match="cannot split 9 samples into 10 shards"):
        reshard(tmp_path, ShardOutput(tmp_path / "out", shards=10))
    damage(tmp_path, 1, "flipped")
    with pytest.raises(UserError, match=r"000001\.tar cannot be read"):
        reshard(tmp_path, ShardOutput(tmp_path / "out", shards=3))


def test_holding_out_splits_by_key_alone(tmp_path, pack):
    pack(tmp_path / "a", [5, 9, 2])
    train, held = tmp_path / "train", tmp_path / "held"
    hold_out(tmp_path / "a", 6, ShardOutput(train, shards=2), ShardOutput(held))
    assert len(every_sample(held)) == 6
    assert every_sample(train) | every_sample(held) == every_sample(tmp_path / "a")
    assert not every_sample(train).keys() & every_sample(held).keys()
    reshard(tmp_path / "a", ShardOutput(tmp_path / "b", shards=4))
    hold_out(tmp_path / "b", 6, ShardOutput(tmp_path / "t"), ShardOutput(tmp_path / "h", shards=1))
    assert every_sample(tmp_path / "h") == every_sample(held)


def test_holding_out_leaves_something_to_train_on(tmp_path, pack):
    pack(tmp_path / "a", [5, 9, 2])
    for samples in (0, 16):
        with pytest.raises(UserError, match="choose from 1 to 15, of 16 samples"):
            hold_out(tmp_path / "a", samples, ShardOutput(tmp_path / "b"), ShardOutput("c"))
    with pytest.raises(UserError, match="choose two folders"):
        hold_out(tmp_path / "a", 3, ShardOutput(tmp_path / "b"), ShardOutput(tmp_path / "b"))


@pytest.mark.slow
def test_the_command_has_exit_codes(tmp_path, pack, tool):
    pack(tmp_path / "data", [5, 4], shape=(3, 4, 4))
    good = tool("check_data", tmp_path / "data")
    assert good.returncode == 0, good.stderr
    assert (tmp_path / "data" / "contact_sheet.png").exists()
    done = tool("check_data", tmp_path / "data", "--reshard", 3, "--out", tmp_path / "new")
    assert f"{tmp_path}/new: 9 samples of 7 classes in 3 shards" in done.stdout, done.stderr
    split = ("--hold-out", 4, tmp_path / "held", "--out", tmp_path / "train")
    done = tool("check_data", tmp_path / "data", *split)
    assert f"{tmp_path}/held: 4 samples" in done.stdout, done.stderr
    assert f"{tmp_path}/train: 5 samples" in done.stdout
    damage(tmp_path / "data", 0, "flipped")
    bad = tool("check_data", tmp_path / "data", "--no-sheet")
    assert bad.returncode == 1
    assert "problem: shard" in bad.stdout
    assert bad.stderr.count("Traceback") == 0
    assert tool("check_data", tmp_path / "nowhere").returncode == 1
