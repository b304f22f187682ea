"""Unreadable shards in a real run: counted over all ranks, shown, and of no harm to a resume."""

import os
from pathlib import Path

import pytest

from diffmoe.data.lanes import lane_shards
from tests.helpers.runs import (
    SAMPLES,
    assert_identical,
    metrics,
    newest,
    pack,
    run_config,
    tensors,
    train,
)
from tests.helpers.shards import damage

pytestmark = pytest.mark.slow


@pytest.fixture
def damaged(tmp_path):
    """A data folder in which the first shard of lane 0 and that of lane 3 are broken."""
    folder = pack(tmp_path / "data")
    for lane, how in [(0, "missing"), (3, "flipped")]:
        damage(folder, lane_shards(0, 0, lane, 4, len(SAMPLES))[0], how)
    return tmp_path


class StandardError:
    """Lets every rank write to a file of its own; its readers inherit that."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rank: int) -> None:
        with open(self.folder / f"stderr-{rank}", "w") as file:
            os.dup2(file.fileno(), 2)


def test_bad_shards_of_all_ranks_are_counted_and_a_resume_is_exact(damaged):
    config = run_config(damaged, 6, data__max_bad_shards=2, data__workers=1)
    assert train(config, world=2, prepare=StandardError(damaged)) == [True, True]
    assert metrics(config)[0]["bad_shards"] == 2
    assert metrics(config)[-1]["bad_shards"] == 2
    told = "".join(file.read_text() for file in damaged.glob("stderr-*"))
    assert told.count("the next shard of its lane replaces it") >= 2  # each rank reports its own
    once = tensors(newest(config))
    halves = config.replace({"output": str(damaged / "halves"), "training.total_samples": 24})
    train(halves, world=2)
    train(halves.replace({"training.total_samples": 48, "data.workers": 0}), world=2)
    assert_identical(tensors(newest(halves)), once)


def test_more_than_allowed_stop_every_rank_with_one_message(damaged):
    config = run_config(damaged, 6, data__max_bad_shards=1)
    with pytest.raises(AssertionError, match="all ranks together could not read 2 shards"):
        train(config, world=2)
