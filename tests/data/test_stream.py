import multiprocessing
import os
import signal
from itertools import islice

import pytest
import torch

from diffmoe.data.lanes import DataSource, lane_shards
from diffmoe.data.stream import Batch, LatentStream
from diffmoe.errors import UserError
from diffmoe.tree import tree_cat
from tests.helpers.streams import LANES, RAGGED, STEPS, N, batches, equal


def ids(batch: Batch) -> list[int]:
    return batch.latents[:, 0, 0, 0].abs().long().tolist()


@pytest.fixture(scope="module")
def plain(tmp_path_factory, pack):
    directory = tmp_path_factory.mktemp("plain")
    return directory, pack(directory, RAGGED)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, pack):
    """Moments with flips, unscaled: everything that draws or computes."""
    directory = tmp_path_factory.mktemp("drawn")
    fields = {"content": "mean_logvar", "flips": True, "scaled": False, "scale": 0.5}
    return directory, pack(directory, RAGGED, **fields)


def test_batches_have_the_promised_shapes_and_types(plain):
    (batch,) = batches(*plain, steps=1, my_lanes=[1, 2])
    assert batch.latents.shape == (2 * N, 2, 4, 4)
    assert batch.latents.dtype == torch.float32
    assert batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == [i % 7 for i in ids(batch)]


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(drawn, workers):
    assert equal(batches(*drawn, workers=workers), batches(*drawn, workers=0))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("workers", [0, 1])
def test_any_split_of_the_lanes_over_ranks_gives_the_same_batches(drawn, ranks, workers):
    share = LANES // ranks
    parts = [
        batches(*drawn, my_lanes=range(r * share, (r + 1) * share), workers=workers)
        for r in range(ranks)
    ]
    assert equal([tree_cat(step) for step in zip(*parts, strict=True)], batches(*drawn))


# Every step of three epochs: inside shards, at their ends, at the ends of ragged epochs.
@pytest.mark.parametrize("done", range(1, STEPS))
def test_a_stream_resumed_at_any_clock_equals_the_undisturbed_one(drawn, done):
    resumed = batches(*drawn, steps=STEPS - done, clock=done * LANES * N)
    assert equal(resumed, batches(*drawn)[done:])


def test_a_resume_may_change_workers_and_ranks(drawn):
    resumed = batches(*drawn, steps=5, my_lanes=[2, 3], workers=2, clock=9 * LANES * N)
    whole = batches(*drawn)[9:14]
    assert equal(resumed, [Batch(b.latents[2 * N :], b.labels[2 * N :]) for b in whole])


@pytest.mark.parametrize("first", [1, 4, 9])
@pytest.mark.parametrize("second", [1, 2, 4])
def test_a_resume_of_a_resume_equals_the_undisturbed_stream(drawn, first, second):
    """Each part on other ranks and workers than the one before."""
    parts = batches(*drawn, steps=first)
    clock = first * LANES * N
    halves = [
        batches(*drawn, steps=second, my_lanes=lanes, workers=1, clock=clock)
        for lanes in ([0, 1], [2, 3])
    ]
    parts += [tree_cat(step) for step in zip(*halves, strict=True)]
    clock += second * LANES * N
    parts += batches(*drawn, steps=STEPS - first - second, workers=3, clock=clock)
    assert equal(parts, batches(*drawn))


def test_every_sample_comes_once_per_epoch_of_its_lane(plain):
    first = [sum(RAGGED[:shard]) for shard in range(len(RAGGED))]
    seen_in_first_epoch = []
    for lane in range(LANES):
        stream = [
            i for batch in batches(*plain, steps=60, my_lanes=[lane], n=1) for i in ids(batch)
        ]
        for epoch in range(3):
            shards = lane_shards(3, epoch, lane, LANES, len(RAGGED))
            expected = [i for s in shards for i in range(first[s], first[s] + RAGGED[s])]
            epoch_ids, stream = stream[: len(expected)], stream[len(expected) :]
            assert sorted(epoch_ids) == sorted(expected)
            if epoch == 0:
                seen_in_first_epoch += epoch_ids
    assert sorted(seen_in_first_epoch) == list(range(sum(RAGGED)))


def test_draws_differ_from_step_to_step_and_lane_to_lane(tmp_path, pack):
    # One sample per shard with mean 0 and deviation 1 would repeat itself, were the draws alike.
    manifest = pack(tmp_path, [1, 1], content="mean_std")
    values = [
        value
        for batch in batches(tmp_path, manifest, steps=4, lanes=2, n=1)
        for value in batch.latents[:, 1, 1, 1].tolist()
    ]
    assert len(set(values)) == 8


def test_features_are_of_the_view_that_was_drawn_and_end_at_a_clock(tmp_path, pack):
    content = {"encoder": "e", "layer": "l", "checksum": None, "shape": (3, 2, 2)}
    manifest = pack(tmp_path, RAGGED, flips=True, features=content)
    until = 3 * LANES * N
    options = {"steps": 5, "features_until": until}
    found = batches(tmp_path, manifest, **options)
    assert [batch.features is None for batch in found] == [False] * 3 + [True] * 2
    signs = set()
    for batch in found[:3]:
        assert batch.features.shape == (LANES * N, 3, 2, 2)
        assert batch.features.dtype == torch.float16
        own = batch.features[:, 0, 0, 0].float()
        assert torch.equal(own, batch.latents[:, 0, 0, 0])
        signs |= set(own.sign().tolist())
    assert signs >= {1, -1}
    assert equal(batches(tmp_path, manifest, workers=2, **options), found)
    resumed = batches(tmp_path, manifest, steps=3, features_until=until, clock=2 * LANES * N)
    assert equal(resumed, found[2:])
    without = [batch._replace(features=None) for batch in found]
    assert equal(batches(tmp_path, manifest, steps=5), without)


def test_reading_leaves_the_global_generator_alone(plain):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    batches(*plain, steps=1, workers=1)
    assert torch.equal(torch.rand(1), expected)


def test_the_arithmetic_does_not_depend_on_threads(tmp_path, pack):
    manifest = pack(tmp_path, [64], content="mean_logvar", shape=(4, 32, 32))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = batches(tmp_path, manifest, steps=2, lanes=1, n=48)
        torch.set_num_threads(2)
        assert equal(batches(tmp_path, manifest, steps=2, lanes=1, n=48), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_shard_stops_the_stream_with_its_message_alone(tmp_path, pack, workers):
    manifest = pack(tmp_path, RAGGED)
    for shard in manifest.shards:
        path = tmp_path / shard.name
        path.write_bytes(path.read_bytes()[:3000])
    message = r"^shard .*\.tar cannot be read \(truncated[^\n]*; 3 attempts\)[^\n]*max_bad_shards"
    with pytest.raises(UserError, match=message) as caught:
        batches(tmp_path, manifest, workers=workers)
    assert "Traceback" not in str(caught.value)


def test_an_error_comes_at_its_step_not_before(tmp_path, pack):
    manifest = pack(tmp_path, [6, 6])
    last = lane_shards(3, 0, 0, 1, 2)[1]
    (tmp_path / f"00000{last}.tar").unlink()
    for workers in (0, 1):
        assert len(batches(tmp_path, manifest, steps=2, lanes=1, workers=workers)) == 2
        with pytest.raises(UserError, match=rf"00000{last}\.tar"):
            batches(tmp_path, manifest, steps=3, lanes=1, workers=workers)


def test_fewer_shards_than_lanes_and_a_clock_of_other_lanes_are_refused(plain):
    with pytest.raises(UserError, match=r"data\.lanes=8 does not fit the 7 shards"):
        batches(*plain, lanes=8)
    with pytest.raises(UserError, match=r"clock 13 is not a multiple of data\.lanes=4"):
        batches(*plain, clock=13)


@pytest.mark.timeout(60)
def test_workers_survive_signals_to_the_group_and_end_with_the_stream(drawn):
    directory, manifest = drawn
    stream = iter(
        LatentStream(DataSource(directory, manifest, lanes=4, seed=3), range(4), 3, workers=2)
    )
    before = set(multiprocessing.active_children())
    got = [next(stream)]
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for kind in (signal.SIGINT, signal.SIGTERM):
        for worker in workers:
            os.kill(worker.pid, kind)
        got += islice(stream, 4)
    assert equal(got, batches(*drawn, steps=9))
    stream.close()
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0
