"""Kills real runs of two ranks at random moments and holds the folder to its word after each.

  python -m tests.helpers.kill_test --kills 60 --seed 0

After every kill: whatever carries a checkpoint's name is whole; nothing that was announced as saved
is gone; the next start goes on from the newest. At the end the survivor equals, bit for bit, a run
that nobody disturbed. The tests run a short form (test_crash.py).
"""

import argparse
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

from diffmoe.checkpoints.checksums import find_damage
from diffmoe.checkpoints.folder import leftovers, names
from diffmoe.config import Config
from tests.helpers.ranks import ranks_of
from tests.helpers.runs import assert_identical, clock, newest, pack, run_config, tensors, train

WORLD = 2
# Whom to kill, and when: at any moment from the launch on, or while a save is under way.
VICTIMS = {"all": range(WORLD), "first": [0], "second": [1]}
MOMENTS = ("any", "saving")


def kill_many(folder: Path, kills: int, seed: int) -> Counter:
    """Kill `kills` times; raises AssertionError where the folder lied. Returns what happened."""
    choice = random.Random(seed)
    seen: Counter = Counter()
    pack(folder / "data")
    config = run_config(
        folder,
        10**6,
        training__checkpoint_samples=8,
        training__snapshot_samples=24,
        training__keep_last=3,
        parallel__expert_parallel=WORLD,
    )
    output = Path(config.output)
    for _ in range(kills):
        before = names(output)
        victim, moment = choice.choice(sorted(VICTIMS)), choice.choice(MOMENTS)
        with ranks_of(config, WORLD, impatient) as ranks:
            if moment == "saving":
                _wait_for_a_save(output, before, choice.randrange(1, 8))
                time.sleep(choice.uniform(0, 0.1))
            else:
                time.sleep(choice.uniform(0, 4))
            ranks.kill(*VICTIMS[victim])
            codes = ranks.wait(60)
            told = ranks.told()
        assert None not in codes, f"a rank outlived the death of {victim}:\n{told}"
        seen[f"killed {victim}"] += 1
        seen[f"at {moment} moment"] += 1
        _hold_to_its_word(output, before, told, seen)
    _finish(folder, config, seen)
    return seen


def impatient(rank: int) -> None:
    from diffmoe.parallel import rendezvous
    from diffmoe.training import watchdog

    rendezvous.JOIN = 15.0
    watchdog.INTERVAL, watchdog.SILENCE = 0.2, 30.0


def _wait_for_a_save(output: Path, before: list[str], further: int) -> None:
    """Until a temporary folder is there, after `further` complete checkpoints of this start."""
    deadline = time.monotonic() + 60
    first = int(before[-1][5:]) if before else 0
    while time.monotonic() < deadline:
        last = names(output)[-1:]
        if last and int(last[0][5:]) >= first + further and leftovers(output):
            return
        time.sleep(0.002)
    raise AssertionError("no save in 60 s")


def _hold_to_its_word(output: Path, before: list[str], told: str, seen: Counter) -> None:
    found = names(output)
    for name in found:
        assert find_damage(output / name) == [], name
    announced = [name for name in _after(told, "saved ") if name.startswith("step-")]
    resumed = _after(told, "resumed ")
    if resumed:
        assert resumed == before[-1:], f"resumed {resumed}, there were {before}"
        seen["resumed"] += 1
    newest_known = max([*announced, *before[-1:]], default=None)
    if newest_known is not None:
        assert found, "every checkpoint is gone"
        assert found[-1] >= newest_known, f"{newest_known} was announced, {found[-1]} is there"
    seen["left a torn save"] += bool(leftovers(output))
    latest = output / "latest"
    if found and (not latest.exists() or latest.read_text() != found[-1]):
        seen["between the rename and `latest`"] += 1


def _after(told: str, word: str) -> list[str]:
    """The checkpoints named after a word at a line's beginning (or a progress bar's end)."""
    lines = [line[line.index(word) :] for line in told.splitlines() if word in line]
    return [Path(line.split()[1]).name for line in lines]


def _finish(folder: Path, config: Config, seen: Counter) -> None:
    steps = clock(newest_whole(config))["step"] + 3
    last = config.replace({"training.total_samples": 8 * steps})
    assert train(last, WORLD) == [True] * WORLD
    undisturbed = last.replace(
        {"output": str(folder / "undisturbed"), "training.checkpoint_samples": 8 * steps}
    )
    assert train(undisturbed, WORLD) == [True] * WORLD
    assert_identical(tensors(newest(last)), tensors(newest(undisturbed)))
    output = Path(config.output)
    assert names(output, "ema") == [f"ema-{step:08d}" for step in range(3, steps + 1, 3)]
    assert [find_damage(output / name) for name in names(output, "ema")] == [[]] * (steps // 3)
    seen["steps"] = steps


def newest_whole(config: Config) -> Path:
    return Path(config.output) / names(Path(config.output))[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    began = time.monotonic()
    for what, count in sorted(kill_many(folder, arguments.kills, arguments.seed).items()):
        print(f"{count:6d} {what}")
    print(f"{time.monotonic() - began:6.0f} seconds")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
