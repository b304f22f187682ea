"""Features beside existing captions: exact, however often killed and on any number of ranks."""

import tarfile

import numpy as np
import pytest
import torch

from diffmoe import work
from diffmoe.data.captions import Captions
from diffmoe.data.fetching import open_shard
from diffmoe.data.manifest import Manifest, TextContent
from diffmoe.data.packing import ShardWriter
from diffmoe.data.reading import OpenShard, read_shard
from diffmoe.errors import UserError
from diffmoe.prepare import sharding, text_features
from diffmoe.prepare.resharding import reshard
from diffmoe.prepare.sharding import ShardOutput
from diffmoe.prepare.text_features import encode_text
from diffmoe.text.encoders import ByteTokenizer, TransformersEncoder
from diffmoe.work import Ranks
from tests.helpers.processes import killed
from tests.helpers.shards import FIELDS, array_of, captions_of, members, pack_captioned
from tests.helpers.tools import tool


def captions_in(directory) -> dict[str, Captions]:
    manifest = Manifest.load(directory)
    found = {}
    for shard in manifest.shards:
        address = manifest.address(directory, shard)
        opened = OpenShard(open_shard(address, shard, attempts=1), shard, manifest, address)
        found |= {key: opened.captions(index) for index, key in enumerate(opened.keys)}
        opened.close()
    return found


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("packed")
    pack_captioned(directory)
    return directory


@pytest.fixture(scope="module")
def t5(folders):
    return TransformersEncoder(folders / "t5", 8)


def test_captions_come_back_in_order(packed):
    found = captions_in(packed)
    assert {key: c.lines for key, c in found.items()} == {
        f"{i:05d}": captions_of(i) for i in range(17)
    }
    assert all(c.tokens is None and c.lengths is None for c in found.values())


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_every_caption_has_its_true_tokens(packed, folders, tmp_path, kind):
    encoder = TransformersEncoder(folders / kind, 8)
    manifest = encode_text(packed, ShardOutput(tmp_path), encoder, batch=4)
    assert manifest.text == encoder.content
    assert [shard.samples for shard in manifest.shards] == [9, 8]
    found = captions_in(tmp_path)
    for i in range(17):
        own = found[f"{i:05d}"]
        assert own.lines == captions_of(i)
        starts = np.cumsum([0, *own.lengths])
        assert starts[-1] == len(own.tokens)
        for k, line in enumerate(own.lines):
            text = encoder.encode([line])
            wanted = text.tokens[0][text.mask_BL[0]]
            tokens = torch.from_numpy(own.tokens[starts[k] : starts[k + 1]].astype(np.float32))
            # float16 keeps 11 bits; the numbers are around 1.
            torch.testing.assert_close(tokens, wanted, atol=3e-3, rtol=1e-3)
            if kind == "clip":
                vector = torch.from_numpy(own.pooled[k].astype(np.float32))
                torch.testing.assert_close(vector, text.pooled[0], atol=3e-3, rtol=1e-3)


def test_members_are_as_the_manifest_says(packed, folders, tmp_path):
    encode_text(packed, ShardOutput(tmp_path), TransformersEncoder(folders / "clip", 8))
    with tarfile.open(tmp_path / "000000.tar") as tar:
        kinds = {name.partition(".")[2] for name in tar.getnames()}
    assert kinds == {
        "cls",
        "latent.npy",
        "txt",
        "text.npy",
        "text_lengths.npy",
        "text_pooled.npy",
    }


def test_latents_and_labels_stay(packed, t5, tmp_path):
    def samples(directory):
        manifest = Manifest.load(directory)
        every = [
            s for shard in manifest.shards for s in read_shard(directory / shard.name, manifest)
        ]
        return {sample.key: (sample.label, sample.array.tobytes()) for sample in every}

    encode_text(packed, ShardOutput(tmp_path), t5)
    assert samples(tmp_path) == samples(packed)


def test_any_number_of_ranks_gives_the_same_shards(packed, t5, tmp_path):
    encode_text(packed, ShardOutput(tmp_path / "one"), t5, batch=4)
    done = [
        encode_text(packed, ShardOutput(tmp_path / "two", ranks=Ranks(r, 2)), t5, batch=4)
        for r in (1, 0)
    ]
    assert [manifest is None for manifest in done] == [True, False]
    assert members(tmp_path / "two") == members(tmp_path / "one")
    assert Manifest.load(tmp_path / "two") == Manifest.load(tmp_path / "one")


# In a shard's middle, between a tar's name and its record, between the records and the manifest.
@pytest.mark.parametrize(
    ("name", "moments"), [("_join", [2, 12]), ("write_json", [1, 2, 3]), ("_finish", [1])]
)
def test_a_killed_work_goes_on_to_the_same_bytes(packed, t5, tmp_path, name, moments):
    encode_text(packed, ShardOutput(tmp_path / "whole"), t5, batch=4)
    module = {"_join": text_features, "write_json": work}.get(name, sharding)
    for moment in moments:
        out = tmp_path / f"{name}-{moment}"
        assert killed(
            lambda out=out: encode_text(packed, ShardOutput(out), t5, batch=4), module, name, moment
        )
        assert not (out / "manifest.json").exists()
        encode_text(packed, ShardOutput(out), t5, batch=4)
        assert members(out) == members(tmp_path / "whole")
        assert list(out.glob("*.tmp")) == []


def test_other_features_are_no_rest_of_this_work(packed, folders, t5, tmp_path):
    encode_text(packed, ShardOutput(tmp_path, ranks=Ranks(0, 2)), t5)
    with pytest.raises(UserError, match=r"text: .*t5-\w+.* there, .*clip-\w+.* now"):
        encode_text(packed, ShardOutput(tmp_path), TransformersEncoder(folders / "clip", 8))


def test_features_are_replaced_and_dropped(packed, folders, t5, tmp_path):
    encode_text(packed, ShardOutput(tmp_path / "t5"), t5)
    encode_text(
        tmp_path / "t5", ShardOutput(tmp_path / "clip"), TransformersEncoder(folders / "clip", 8)
    )
    assert all(c.pooled.shape[1] == 16 for c in captions_in(tmp_path / "clip").values())
    back = encode_text(tmp_path / "clip", ShardOutput(tmp_path / "bytes"), ByteTokenizer(40))
    assert back.text == TextContent(encoder="bytes", length=40)
    assert captions_in(tmp_path / "bytes") == captions_in(packed)


def test_resharding_keeps_captions_and_features(packed, t5, tmp_path):
    encode_text(packed, ShardOutput(tmp_path / "a"), t5)
    reshard(tmp_path / "a", ShardOutput(tmp_path / "b", shards=5))
    a, b = captions_in(tmp_path / "a"), captions_in(tmp_path / "b")
    assert a.keys() == b.keys()
    for key, captions in a.items():
        assert b[key].lines == captions.lines
        assert b[key].tokens.tobytes() == captions.tokens.tobytes()


def test_shards_without_captions_are_refused(t5, tmp_path):
    with ShardWriter(tmp_path / "plain", 3, **FIELDS) as writer:
        for i in range(3):
            writer.add(f"{i}", 0, array_of(i, (2, 4, 4)))
    with pytest.raises(UserError, match=r"sample \d is broken \('txt'\)"):
        encode_text(tmp_path / "plain", ShardOutput(tmp_path / "out"), t5)


@pytest.mark.slow
def test_the_command_on_two_ranks(packed, folders, tmp_path):
    arguments = ["--encoder", folders / "t5", "--length", 8, "--device", "cpu"]
    ranks = [
        tool("encode_text", packed, tmp_path, *arguments, RANK=str(r), WORLD_SIZE="2")
        for r in (0, 1)
    ]
    assert "rank 0 of 2 has finished; other ranks are still working" in ranks[0].stdout
    assert "17 samples with captions in 2 shards" in ranks[1].stdout, ranks[1].stderr
    assert "to train on it: 'model.text={encoder: t5-" in ranks[1].stdout
    wrong = tool("encode_text", packed, tmp_path, "--encoder", "bytes")
    assert wrong.returncode == 2
    assert "begun with other settings" in wrong.stderr
