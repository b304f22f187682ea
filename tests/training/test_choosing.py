"""What a run goes on from: the newest whole checkpoint, never in silence beside a broken one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmoe.checkpoints.checksums import find_damage
from diffmoe.checkpoints.folder import find_complete, names
from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.training.resume import find_checkpoint
from tests.helpers.runs import (
    SignalDuringStep,
    assert_identical,
    clock,
    metrics,
    newest,
    pack,
    run_config,
    tensors,
    train,
)


def refusal(config: Config, resume: str, allowed: list[str] | None = None) -> str:
    with pytest.raises(UserError) as error:
        find_checkpoint(config, resume, allowed)
    return str(error.value)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Config]:
    """Checkpoints at steps 1 and 2, of two ranks."""
    folder = tmp_path_factory.mktemp("trained")
    pack(folder / "data")
    config = run_config(folder, 2, training__checkpoint_samples=8, parallel__expert_parallel=2)
    train(config, world=2)
    return folder, config


@pytest.fixture
def run(tmp_path: Path, trained) -> Config:
    """A copy of `trained` to be broken, which still has two steps to go, on one rank."""
    folder, config = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    changes = {"output": str(tmp_path / "run"), "training.total_samples": 32}
    return config.replace({**changes, "parallel.expert_parallel": 1})


def test_auto_takes_the_newest(run: Config):
    assert find_checkpoint(run, "auto").checkpoint == newest(run)


def test_auto_and_none_start_afresh_in_an_empty_output(run: Config, tmp_path: Path):
    fresh = run.replace({"output": str(tmp_path / "fresh")})
    for _ in range(2):
        assert find_checkpoint(fresh, "auto")[:2] == (None, [])
        assert find_checkpoint(fresh, "none")[:2] == (None, [])
        (tmp_path / "fresh").mkdir(exist_ok=True)


def test_none_beside_checkpoints(run: Config):
    assert refusal(run, "none") == (
        f"--resume none, but output={run.output} holds step-00000002; choose another output"
    )


def test_a_path_must_be_there(run: Config):
    message = refusal(run, f"{run.output}/step-00000009")
    assert message.startswith(f"{run.output}/step-00000009 does not exist (did you mean ")


def test_a_path_is_an_older_checkpoint_or_a_runs_folder(run: Config, tmp_path: Path):
    folder = Path(run.output)
    older = find_checkpoint(run, f"{folder}/step-00000001")
    assert older.checkpoint == folder / "step-00000001"
    assert f"{folder}/step-00000002 is set aside as abandoned-step-00000002" in older.notes
    assert find_checkpoint(run, str(folder)).checkpoint == folder / "step-00000002"
    fork = run.replace({"output": str(tmp_path / "fork")})
    assert find_checkpoint(fork, str(folder)).checkpoint == folder / "step-00000002"


def test_a_path_would_mix_two_runs(run: Config, tmp_path: Path):
    shutil.copytree(run.output, tmp_path / "other")
    message = refusal(run, str(tmp_path / "other"))
    assert f"output={run.output}, which holds step-00000002 of its own" in message
    assert "choose another output" in message


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {"cut": _cut, "flip": _flip, "remove": Path.unlink}
FILES = ["checksums.json", "run.json", "index.json", "__0_0.distcp", "__1_0.distcp"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_recognized_named_and_passed_over(run: Config, damage: str, file: str):
    folder = Path(run.output)
    broken = folder / "step-00000002"
    assert sorted(path.name for path in broken.iterdir()) == sorted(FILES)
    DAMAGES[damage](broken / file)
    problems = find_damage(broken)
    assert problems
    if file != "checksums.json" or damage != "flip":  # a flipped digit there accuses another file
        assert file in problems[0]
    found = find_checkpoint(run, "auto")
    assert found.checkpoint == folder / "step-00000001"
    assert f"{broken} is passed over: {problems[0]}" in found.notes
    assert problems[0] in refusal(run, str(broken)) or damage == "remove"
    if damage != "flip":  # sizes alone are looked at before sampling
        assert find_complete(folder) == folder / "step-00000001"


def test_nothing_whole_is_never_started_over_in_silence(run: Config):
    for name in names(Path(run.output)):
        _flip(Path(run.output) / name / "__0_0.distcp")
    message = refusal(run, "auto")
    assert message.startswith(f"{run.output} holds no whole checkpoint:\n")
    for name in ("step-00000001", "step-00000002"):
        assert f"{run.output}/{name}/__0_0.distcp is damaged" in message
    assert message.endswith("choose another output to start afresh")


@pytest.mark.slow
def test_what_a_kill_left_is_told_and_removed(run: Config):
    folder = Path(run.output)
    (folder / ".step-00000003.tmp").mkdir()
    (folder / ".step-00000003.tmp/__0_0.distcp").write_bytes(b"half")
    _flip(folder / "step-00000002/__1_0.distcp")
    found = find_checkpoint(run, "auto")
    assert (
        f"{folder}/.step-00000003.tmp is left over from an interrupted save; it is removed"
        in found.notes
    )
    assert train(run) == [True]
    assert names(folder) == ["step-00000001", "step-00000002", "step-00000003", "step-00000004"]
    assert not (folder / ".step-00000003.tmp").exists()
    assert find_damage(folder / "abandoned-step-00000002") != []
    assert [find_damage(folder / name) for name in names(folder)] == [[]] * 4


def test_latest_is_for_people(run: Config):
    """Programs look at what is there; a kill may fall between the rename and `latest`."""
    folder = Path(run.output)
    for text in ("step-00000001", "step-00000009", ""):
        (folder / "latest").write_text(text)
        assert find_checkpoint(run, "auto").checkpoint == folder / "step-00000002"


def test_an_older_checkpoint_begins_another_future(run: Config):
    """What came after it must not be taken for this run's, even by a kill before the next save."""
    folder = Path(run.output)
    assert train(run, resume=f"{folder}/step-00000001", prepare=end_before_the_loop) == ["ended"]
    assert names(folder) == ["step-00000001"]
    assert find_checkpoint(run, "auto").checkpoint == folder / "step-00000001"
    assert clock(folder / "abandoned-step-00000002")["step"] == 2


def end_before_the_loop(rank: int) -> None:
    from diffmoe.training import start

    start.train = lambda *_: "ended"


# The same command again, after a preemption ---------------------------------------------------


@pytest.mark.slow
def test_a_path_in_another_output_is_gone_on_with_by_the_same_command(run: Config, tmp_path: Path):
    """Preempted once before any save and once after one; PATH itself may be pruned meanwhile."""
    source = tmp_path / "source"
    shutil.copytree(run.output, source)
    whole, fork = (run.replace({"output": str(tmp_path / name)}) for name in ("whole", "fork"))
    path = str(source / "step-00000001")
    assert train(whole, resume=path) == [True]
    assert train(fork, resume=path, prepare=end_before_the_loop) == ["ended"]
    assert train(fork, resume=path, prepare=SignalDuringStep(3)) == [False]
    assert names(Path(fork.output)) == ["step-00000002", "step-00000003"]
    found = find_checkpoint(fork, path)
    assert found.checkpoint == newest(fork)
    assert f"{fork.output} has already been trained on from {path}, and goes on" in found.notes
    # Of another checkpoint, another run, another configuration: as before.
    (source / "step-00000002").rename(source / "step-00000007")
    for other, config in (
        (source / "step-00000007", fork),
        (run.output, fork),
        (path, fork.replace({"optimizer.learning_rate": 0.02})),
    ):
        message = refusal(config, str(other), ["optimizer.learning_rate"])
        assert f"output={fork.output}, which holds step-00000003 of its own" in message
    shutil.rmtree(source)
    assert train(fork, resume=path) == [True]
    assert_identical(tensors(newest(fork)), tensors(newest(whole)))
    assert find_checkpoint(fork, "auto").checkpoint == newest(fork)
    assert find_checkpoint(fork, path).origin == find_checkpoint(fork, "auto").origin


@pytest.mark.slow
def test_a_runs_folder_as_path_is_gone_on_with_although_it_has_newer_ones(
    run: Config, tmp_path: Path
):
    fork = run.replace({"output": str(tmp_path / "fork")})
    assert train(fork, resume=run.output, prepare=SignalDuringStep(3)) == [False]
    assert train(run) == [True]
    assert find_checkpoint(fork, run.output).checkpoint == newest(fork)


@pytest.mark.slow
def test_an_older_checkpoint_of_the_output_is_gone_on_with_by_the_same_command(run: Config):
    folder = Path(run.output)
    older = f"{folder}/step-00000001"
    assert train(run, resume=older, prepare=SignalDuringStep(3)) == [False]
    assert find_checkpoint(run, older).checkpoint == folder / "step-00000003"
    assert train(run, resume=older) == [True]
    assert names(folder) == [f"step-0000000{step}" for step in (1, 2, 3, 4)]
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    # With other settings it is begun from once more.
    other = find_checkpoint(
        run.replace({"optimizer.learning_rate": 0.02}), older, ["optimizer.learning_rate"]
    )
    assert other.checkpoint == folder / "step-00000001"
    assert other.aside == tuple(folder / f"step-0000000{step}" for step in (2, 3, 4))


# Which names count ----------------------------------------------------------------------------


def test_copies_are_left_alone_and_taken_by_their_path(run: Config):
    """A copy under any other name is not the newest, whatever its name says."""
    folder = Path(run.output)
    copied = [folder / name for name in ("step-best", "step-00000007", "step-9", "step-2-old")]
    for copy in copied:
        shutil.copytree(folder / "step-00000001", copy)
    (folder / "step-00000003x").mkdir()
    assert names(folder) == ["step-00000001", "step-00000002"]
    assert find_complete(folder) == folder / "step-00000002"
    found = find_checkpoint(run, "auto")
    assert (found.checkpoint, found.aside) == (folder / "step-00000002", ())
    for copy in copied:
        assert any(
            note.startswith(f"{copy} is no checkpoint of this run's") for note in found.notes
        )
    asked = find_checkpoint(run, f"{folder}/step-best")
    assert (asked.checkpoint, asked.aside) == (copied[0], (folder / "step-00000002",))
    assert train(run) == [True]
    assert all(clock(copy)["step"] == 1 for copy in copied)


def test_a_damaged_clock_does_not_make_a_copy(run: Config):
    """Else a run of one damaged checkpoint would start afresh in silence."""
    folder = Path(run.output)
    shutil.rmtree(folder / "step-00000001")
    file = folder / "step-00000002/run.json"
    file.write_text(file.read_text().replace('"step": 2', '"step": 3'))
    assert names(folder) == ["step-00000002"]
    assert "run.json is damaged" in refusal(run, "auto")


def test_auto_sets_nothing_aside(run: Config):
    """What is damaged stays under its name until the run comes to its step again."""
    folder = Path(run.output)
    _flip(folder / "step-00000002/__0_0.distcp")
    shutil.copytree(folder / "step-00000002", folder / "ema-00000002")
    assert train(run, prepare=end_before_the_loop) == ["ended"]
    assert names(folder) == ["step-00000001", "step-00000002"]
    assert names(folder, "ema") == ["ema-00000002"]
    assert (folder / "latest").read_text() == "step-00000001"


def test_harmless_changes_are_listed_and_taken(run: Config):
    changed = run.replace(
        {
            "training.total_samples": 800,
            "data.workers": 3,
            "parallel.zero_stage": 2,
            "logging.log_samples": 80,
        }
    )
    notes = find_checkpoint(changed, "auto").notes
    assert notes == [
        "changed since step-00000002: data.workers: 0 there, 3 now",
        "changed since step-00000002: logging.log_samples: 8 there, 80 now",
        "changed since step-00000002: parallel.expert_parallel: 2 there, 1 now",
        "changed since step-00000002: parallel.zero_stage: 1 there, 2 now",
        "changed since step-00000002: training.total_samples: 16 there, 800 now",
        "experts choose from another pool than before: 1 pools a micro-batch instead of 2, with "
        "moe.token_pool=micro_batch; equal numbers on any layout need `global`",
    ]


def test_changes_that_alter_the_run_are_refused_unless_allowed(run: Config):
    other = run.replace({"optimizer.learning_rate": 0.5, "seed": 7, "training.total_samples": 800})
    message = refusal(other, "auto")
    checkpoint = f"{run.output}/step-00000002"
    assert message.split("\n") == [
        f"{checkpoint} is of a run of another configuration:",
        "  optimizer.learning_rate: 0.01 there, 0.5 now",
        "  seed: 0 there, 7 now",
        "take its values, or --allow-changed optimizer.learning_rate --allow-changed seed to alter "
        "the run from here on",
    ]
    assert "  seed: 0 there" not in refusal(other, "auto", ["seed"])
    found = find_checkpoint(other, "auto", ["seed", "optimizer.learning_rate"])
    assert "changed since step-00000002: seed: 0 there, 7 now" in found.notes
    assert refusal(run, "auto", ["sead"]) == "--allow-changed sead: there is no such field"


def test_the_end_of_a_cosine_alters_the_run(run: Config):
    file = Path(run.output) / "step-00000002/run.json"
    file.write_text(file.read_text().replace('"constant"', '"cosine"'))
    (Path(run.output) / "step-00000002/checksums.json").unlink()
    _sum_again(file.parent)
    message = refusal(run.replace({"optimizer.schedule": "cosine"}), "auto")
    assert "  training.total_samples: 16 there, 32 now" in message


def _sum_again(checkpoint: Path) -> None:
    from diffmoe.files import sha256_of

    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in checkpoint.iterdir()
    }
    (checkpoint / "checksums.json").write_text(json.dumps({"files": files}))


@pytest.mark.parametrize("change", [{"model.depth": 6}, {"moe.experts": 8}])
def test_another_network_is_refused_whatever_is_allowed(run: Config, change: dict):
    message = refusal(run.replace(change), "auto", list(change))
    assert message.startswith(f"{run.output}/step-00000002 is of another network:\n")
    assert next(iter(change)) in message
    assert message.endswith("choose another output")


def test_other_data_alters_the_run(run: Config, tmp_path: Path):
    pack(tmp_path / "data", [9, 5, 6, 8, 4, 6])
    other = run.replace({"data.path": str(tmp_path / "data")})
    said = f"data.path: {tmp_path}/data holds other shards than the run was trained on"
    assert said in refusal(other, "auto")
    assert (
        f"changed since step-00000002: {said}"
        in find_checkpoint(other, "auto", ["data.path"]).notes
    )
    # The same shards at another place are the same data.
    shutil.rmtree(tmp_path / "data")
    pack(tmp_path / "data")
    assert find_checkpoint(other, "auto").checkpoint == newest(run)
