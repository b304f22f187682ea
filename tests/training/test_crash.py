"""Kills, a full disk: the folder is never lied about, and the run goes on from it."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffmoe.checkpoints.checksums import find_damage
from diffmoe.checkpoints.folder import leftovers, names
from tests.helpers.kill_test import kill_many
from tests.helpers.ranks import ranks_of
from tests.helpers.runs import clock, metrics, newest, pack, run_config, train

pytestmark = pytest.mark.slow


def test_killed_at_random_moments_it_loses_nothing_that_was_saved(tmp_path: Path):
    seen = kill_many(tmp_path, kills=4, seed=5)
    assert seen["resumed"] >= 2
    assert seen["at saving moment"] >= 2


@contextlib.contextmanager
def small_disk(path: Path, kib: int) -> Iterator[None]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def size_kib(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) // 1024


@pytest.fixture(scope="module")
def kib(tmp_path_factory) -> int:
    """Of one checkpoint."""
    folder = tmp_path_factory.mktemp("measure")
    pack(folder / "data")
    config = run_config(folder, 1)
    train(config)
    return size_kib(newest(config))


@pytest.mark.root
@pytest.mark.parametrize(("policy", "world"), [("continue", 1), ("stop", 2)])
def test_a_full_disk_keeps_the_previous_checkpoint(
    tmp_path: Path, kib: int, policy: str, world: int
):
    pack(tmp_path / "data")
    with small_disk(tmp_path / "disk", int(1.7 * kib) + 64):
        config = run_config(
            tmp_path,
            10,
            output=str(tmp_path / "disk/run"),
            training__checkpoint_samples=16,
            training__save_failure=policy,
            parallel__expert_parallel=world,
        )
        output = Path(config.output)
        with ranks_of(config, world) as ranks:
            codes = ranks.wait(60)
            told = ranks.told()
        assert set(codes) == {2}, told
        assert names(output) == ["step-00000002"]
        assert find_damage(newest(config)) == []
        assert leftovers(output) == []
        assert "No space left on device" in told, told
        assert f"{output}/step-00000002 remains the newest checkpoint" in told
        assert "Traceback" not in told
        # The last save stops in either case: there is no later one.
        # Else the run ends before it would save again.
        failed, steps = ("step-00000010", 10) if policy == "continue" else ("step-00000004", 6)
        assert f"error: {output}/{failed} was not saved: rank " in told
        assert told.count("error: ") == 1
        assert metrics(config)[-1]["step"] <= steps
        assert ("The run goes on and tries again" in told) == (policy == "continue")

        subprocess.run(
            ["mount", "-o", f"remount,size={8 * kib}k", str(tmp_path / "disk")], check=True
        )
        assert train(config, world) == [True] * world
        assert clock(newest(config))["step"] == 10
