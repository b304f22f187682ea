"""Saving in the background: what it writes, keeps and costs."""

import fcntl
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from diffmoe.checkpoints.folder import names, prune, reading, set_aside, verify
from diffmoe.checkpoints.network import load_network
from diffmoe.checkpoints.pieces import IndexReader
from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.training.resume import find_checkpoint
from tests.helpers.runs import clock, newest, pack, run_config, tensors, train


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Config:
    """Six steps on 2 ranks: checkpoints every 2 steps, averages every 3."""
    folder = tmp_path_factory.mktemp("run")
    pack(folder / "data")
    config = run_config(
        folder,
        6,
        training__checkpoint_samples=16,
        training__snapshot_samples=24,
        training__keep_last=2,
        training__ema_stds=[0.1],
        parallel__expert_parallel=2,
    )
    train(config, world=2)
    return config


def test_a_run_leaves_whole_checkpoints_and_nothing_else(run: Config):
    output = Path(run.output)
    assert sorted(path.name for path in output.iterdir()) == [
        "config.yaml",
        "ema-00000003",
        "ema-00000006",
        "latest",
        "metrics.jsonl",
        "step-00000004",
        "step-00000006",
    ]
    assert (output / "latest").read_text() == "step-00000006"
    for path in output.glob("*-*"):
        assert verify(path) == []
        listed = json.loads((path / "checksums.json").read_text())["files"]
        assert sorted(listed) == ["__0_0.distcp", "__1_0.distcp", "index.json", "run.json"]
        assert {file.name for file in path.iterdir()} == {*listed, "checksums.json"}


def test_a_snapshot_holds_the_averages_alone(run: Config):
    snapshot, checkpoint = (Path(run.output) / f"{kind}-00000006" for kind in ("ema", "step"))
    stored = IndexReader(snapshot).read_metadata().state_dict_metadata
    assert {name.split("/")[0] for name in stored} == {"ema", "ema-0.1", "buffers"}
    full = tensors(checkpoint)
    for name, tensor in tensors(snapshot).items():
        if name.startswith("ema"):
            assert stored[name].properties.dtype == torch.bfloat16
            assert torch.equal(tensor, full[name].bfloat16().float()), name
        else:  # thresholds decide which expert takes a token
            assert stored[name].properties.dtype == torch.float32
            assert torch.equal(tensor, full[name]), name
    network = load_network(snapshot).network
    weight = full["ema/final.weight"].bfloat16().float()
    assert torch.equal(network.final.weight.flatten(), weight)
    with pytest.raises(UserError, match="holds the EMA alone: sample from it; resume a step-"):
        find_checkpoint(run.replace({"output": f"{run.output}-other"}), str(snapshot))


def _checkpoint(folder: Path, step: int) -> None:
    """A complete one, without tensors."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    clock = {"step": step, "samples": 10 * step, "skipped": 0}
    keys = {"clock": clock, "optimizer_steps": step, "saved_by": {"world": 1}}
    text = json.dumps({**keys, "config": {}, "latents": {}})
    (path / "run.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    files = {"run.json": {"bytes": len(text), "sha256": digest}}
    (path / "checksums.json").write_text(json.dumps({"files": files}))


def _steps(folder: Path) -> list[int]:
    return [clock(folder / name)["step"] for name in names(folder)]


def test_retention_keeps_the_last_and_those_at_a_period(tmp_path: Path):
    """Pruned after every save or only once: the same ones stay, also where none ends on it."""
    for name, after_each in (("each", True), ("once", False)):
        for step in (3, 6, 9, 12, 15, 18, 21, 24):
            _checkpoint(tmp_path / name, step)
            if after_each:
                prune(tmp_path / name, keep_last=2, keep_samples=100)
        prune(tmp_path / name, keep_last=2, keep_samples=100)
        assert _steps(tmp_path / name) == [12, 21, 24]
    assert prune(tmp_path / "once", keep_last=1, keep_samples=None) == [
        "step-00000012",
        "step-00000021",
    ]
    assert prune(tmp_path / "once", keep_last=1, keep_samples=None) == []


def test_retention_counts_whole_checkpoints_only(tmp_path: Path):
    """The newest three are torn: what is left whole must stay."""
    for step in range(1, 6):
        _checkpoint(tmp_path, step)
    (tmp_path / "step-00000005/checksums.json").unlink()
    (tmp_path / "step-00000004/run.json").unlink()
    (tmp_path / "step-00000003/run.json").write_text("{")
    assert prune(tmp_path, keep_last=1, keep_samples=None) == ["step-00000001"]
    assert names(tmp_path) == [f"step-0000000{step}" for step in (2, 3, 4, 5)]


def test_what_was_set_aside_goes_once_the_run_is_past_it(tmp_path: Path):
    for step in (1, 2, 3, 4):
        _checkpoint(tmp_path, step)
    for step in (3, 4):
        set_aside(tmp_path / f"step-{step:08d}")
    (tmp_path / "abandoned-ema-00000003").mkdir()
    (tmp_path / "abandoned-mine").mkdir()
    gone = []
    for step in (3, 4, 5):
        _checkpoint(tmp_path, step)
        gone.append(prune(tmp_path, keep_last=2, keep_samples=10))
    assert gone == [
        [],
        ["abandoned-ema-00000003", "abandoned-step-00000003"],
        ["abandoned-step-00000004"],
    ]
    assert _steps(tmp_path) == [1, 2, 3, 4, 5]
    assert (tmp_path / "abandoned-mine").exists()


def test_retention_neither_counts_nor_deletes_copies(tmp_path: Path):
    for step in (1, 2, 3):
        _checkpoint(tmp_path, step)
    for name in ("step-best", "step-00000009"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    assert prune(tmp_path, keep_last=1, keep_samples=None) == ["step-00000001", "step-00000002"]
    left = ["step-00000003", "step-00000009", "step-best"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_retention_leaves_what_is_being_read(tmp_path: Path):
    for step in (1, 2):
        _checkpoint(tmp_path, step)
    with reading(tmp_path / "step-00000001"), reading(tmp_path / "step-00000001"):
        assert prune(tmp_path, keep_last=1, keep_samples=None) == []
    assert prune(tmp_path, keep_last=1, keep_samples=None) == ["step-00000001"]


def test_loading_a_network_counts_as_reading(run: Config, monkeypatch: pytest.MonkeyPatch):
    from diffmoe.training import checkpoint

    file, read = newest(run) / "checksums.json", checkpoint.read

    def locked(*values, **named):
        with open(file, "r+b") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return read(*values, **named)

    monkeypatch.setattr(checkpoint, "read", locked)
    load_network(newest(run))


@pytest.mark.slow
def test_the_copy_is_what_the_step_left_whatever_the_next_one_does(tmp_path: Path):
    """Writing is slow, training goes on: the checkpoints equal those of a patient run."""
    pack(tmp_path / "data")
    states = {}
    for name, prepare in (("patient", patient), ("hasty", slow_disk)):
        config = run_config(
            tmp_path, 6, output=str(tmp_path / name), training__checkpoint_samples=16
        )
        train(config, prepare=prepare)
        states[name] = [tensors(Path(config.output) / n) for n in names(Path(config.output))]
    assert len(states["patient"]) == 3
    for hasty, expected in zip(states["hasty"], states["patient"], strict=True):
        assert all(torch.equal(hasty[name], tensor) for name, tensor in expected.items())
    order = (tmp_path / "hasty/order").read_text().split()
    # A save ends after the next step, and before anything follows the start of the next save.
    assert sorted(order) == ["saved2", "saved4", "saved6", *(f"step{n}" for n in range(2, 7))]
    for pair in ("step3 saved2", "saved2 step5", "step5 saved4", "saved4 saved6"):
        before, after = map(order.index, pair.split())
        assert before < after, order


def patient(rank: int) -> None:
    """Every save is over before the next step."""
    from diffmoe.training.async_save import Saver

    begin = Saver.begin

    def begin_and_wait(async_save, *values):
        begin(async_save, *values)
        async_save.wait()

    Saver.begin = begin_and_wait


def slow_disk(rank: int) -> None:
    """A write lasts until one more step is done (or no more comes); notes the order of events."""
    import threading

    from diffmoe.training import async_save
    from diffmoe.training.telemetry import Telemetry

    write, step, begin = async_save.write, Telemetry.step, async_save.Saver.begin
    stepped = threading.Event()

    def note(folder: Path, event: str) -> None:
        with open(folder / "order", "a") as file:
            file.write(f"{event} ")

    def stepping(telemetry, samples, *values):
        step(telemetry, samples, *values)
        if samples >= 16:
            note(telemetry.path.parent, f"step{samples // 8}")
            stepped.set()

    def slow(state, folder, group):
        step = folder.name.split(".")[1][-1]
        last = step == "6"
        assert last or stepped.wait(30)
        result = write(state, folder, group)
        note(folder.parent, f"saved{step}")
        return result

    def beginning(*values):
        stepped.clear()
        begin(*values)

    async_save.write, Telemetry.step, async_save.Saver.begin = slow, stepping, beginning


def test_what_is_copied_and_no_more(tmp_path: Path):
    """The memory of a save is a copy of this rank's own pieces, half the state on two ranks."""
    pack(tmp_path / "data")
    config = run_config(tmp_path, 2, parallel__expert_parallel=2)
    train(config, world=2, prepare=count_bytes)
    counts = [int((Path(config.output) / f"bytes{rank}").read_text()) for rank in range(2)]
    sizes = {name: tensor.nbytes for name, tensor in tensors(newest(config)).items()}
    buffers = sum(size for name, size in sizes.items() if name.startswith("buffers/"))
    assert sum(counts) == sum(sizes.values()) + buffers  # which each rank holds
    assert max(counts) < 0.6 * sum(sizes.values())


def count_bytes(rank: int) -> None:
    from diffmoe.training.async_save import Saver

    begin = Saver.begin

    def counted(async_save, *values):
        begin(async_save, *values)
        copies = async_save._copies["step"]._held.values()
        held = sum(tensor.untyped_storage().nbytes() for tensor in copies)
        (async_save.folder / f"bytes{rank}").write_text(str(held))

    Saver.begin = counted
