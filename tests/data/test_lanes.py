import time

import pytest

from diffmoe.data.lanes import Position, lane_shards, position, sample_order


@pytest.mark.parametrize(("shards", "lanes"), [(4, 4), (7, 4), (9, 1), (10, 3)])
def test_lanes_share_out_every_shard_once_per_epoch(shards, lanes):
    for epoch in range(3):
        dealt = [s for lane in range(lanes) for s in lane_shards(5, epoch, lane, lanes, shards)]
        assert sorted(dealt) == list(range(shards))


def test_order_changes_with_seed_epoch_and_shard():
    orders = [lane_shards(seed, epoch, 0, 1, 30) for seed in range(3) for epoch in range(3)]
    assert len(set(map(tuple, orders))) == 9
    inside = [sample_order(0, epoch, shard, 30) for epoch in range(3) for shard in range(3)]
    assert len(set(map(tuple, inside))) == 9
    assert all(sorted(order) == list(range(30)) for order in inside)


def test_position_equals_a_walk_sample_by_sample():
    counts, seed, lanes = [3, 1, 4, 2, 5], 11, 2
    for lane in range(lanes):
        walk = [
            Position(epoch, turn, offset)
            for epoch in range(4)
            for turn, shard in enumerate(lane_shards(seed, epoch, lane, lanes, len(counts)))
            for offset in range(counts[shard])
        ]
        assert [position(counts, seed, lane, lanes, i) for i in range(len(walk))] == walk


def test_position_is_quick_after_a_billion_samples():
    start = time.perf_counter()
    epoch, _, _ = position([10_000] * 128, 0, 3, 16, 10**9 // 16)
    assert epoch == 781  # 62.5 million samples of a lane, 80,000 an epoch
    assert time.perf_counter() - start < 2  # 0.02 s on a quiet core


def test_a_lane_without_samples_is_an_error_not_a_hang():
    with pytest.raises(ValueError, match="lane 2 of 3 has no samples"):
        position([4, 4], 0, 2, 3, 0)
