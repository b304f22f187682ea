"""Ranks that were started differently, or see different files, end before any work and name it."""

import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

from diffmoe.checkpoints.folder import names
from diffmoe.parallel.agree import disagreements
from tests.helpers.ranks import ranks_of, run_ranks
from tests.helpers.runs import metrics, newest, pack, run_config, train


def of_this_rank() -> list[str]:
    import torch.distributed as dist

    rank = dist.get_rank()
    values = {"seed": 7 if rank == 1 else 0, "depth": 4, "rates": [0.1, 0.2]}
    if rank != 0:
        values["only there"] = None
    return disagreements(values)


def test_what_differs_is_named_with_rank_field_and_both_values():
    expected = [
        "only there: None on ranks 1, 2, absent on rank 0",
        "seed: 7 on rank 1, 0 on rank 0",
    ]
    assert run_ranks(3, of_this_rank) == [expected] * 3


class Differing:
    """Gives rank 1 other settings, another source file, another package."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rank: int) -> None:
        from diffmoe.training import agreement

        if rank != 1:
            return
        sys.argv += ["seed=7", "training.ema_decay=0.5", "model.depth=2"]
        sys.argv += ["--allow-changed", "seed"]
        shutil.copytree(agreement.CODE, self.folder / "diffmoe")
        (self.folder / "diffmoe/seeding.py").write_text("changed\n")
        agreement.CODE = self.folder / "diffmoe"
        version = agreement.version
        agreement.version = lambda name: "0.3.1" if name == "webdataset" else version(name)


def test_ranks_started_differently_end_before_any_work(tmp_path: Path):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 10**6)
    with ranks_of(config, 2, Differing(tmp_path)) as ranks:
        codes = ranks.wait(40)
        told = ranks.told()
    assert codes == [2, 2], told
    assert told.count("error: the ranks were started differently:") == 1
    for line in (
        "  seed: 7 on rank 1, 0 on rank 0\n",
        "  training.ema_decay: 0.5 on rank 1, 0.8 on rank 0\n",
        "  model.depth: 2 on rank 1, 4 on rank 0\n",
        "  --allow-changed: ['seed'] on rank 1, [] on rank 0\n",
        "  webdataset: 0.3.1 on rank 1, 1.",
        "  code of diffmoe/seeding.py: ",
    ):
        assert line in told, told
    assert "code of diffmoe/config/moe.py" not in told
    assert not Path(config.output).exists()


def test_places_and_readers_of_a_machine_may_differ(tmp_path: Path):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 1)
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    with ranks_of(config, 2, partial(own_place, tmp_path / "copy")) as ranks:
        assert ranks.wait(40) == [0, 0], ranks.told()


def own_place(data: Path, rank: int) -> None:
    if rank == 1:
        sys.argv += [f"data.path={data}", "data.workers=1"]


class Lagging:
    """Rank 1 does not see the newest checkpoint, for its first looks or for ever."""

    def __init__(self, looks: float) -> None:
        self.looks = looks

    def __call__(self, rank: int) -> None:
        from diffmoe.checkpoints import folder
        from diffmoe.training import agreement

        agreement.LAG = 5.0 if self.looks < 10 else 1.0
        if rank != 1:
            return
        see = folder.names
        state = {"left": self.looks}

        def seen(path: Path) -> list[str]:
            state["left"] -= 1
            return see(path)[:-1] if state["left"] >= 0 else see(path)

        folder.names = seen


@pytest.mark.slow
@pytest.mark.parametrize("looks", [3, 10**9], ids=["a while", "for ever"])
def test_a_node_that_lags_takes_no_other_checkpoint(tmp_path: Path, looks: int):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 2, training__checkpoint_samples=8)
    train(config, world=2)
    assert names(Path(config.output)) == ["step-00000001", "step-00000002"]
    longer = config.replace({"training.total_samples": 24})
    with ranks_of(longer, 2, Lagging(looks)) as ranks:
        codes = ranks.wait(40)
        told = ranks.told()
    seen = (
        f"checkpoints in {config.output}: ['step-00000001'] on rank 1, "
        "['step-00000001', 'step-00000002'] on rank 0"
    )
    assert seen in told
    if looks == 3:
        assert codes == [0, 0], told
        assert [line["step"] for line in metrics(config)] == [1, 2, 3]
        assert newest(config).name == "step-00000003"
    else:
        assert codes == [2, 2], told
        assert "error: the ranks see different files:" in told
        assert newest(config).name == "step-00000002"


@pytest.mark.slow
def test_another_manifest_on_one_node_is_named(tmp_path: Path):
    pack(tmp_path / "data")
    pack(tmp_path / "other", counts=[7, 5, 6, 8, 4, 7])
    config = run_config(tmp_path, 1)
    with ranks_of(config, 2, partial(other_data, tmp_path / "other")) as ranks:
        codes = ranks.wait(40)
        told = ranks.told()
    assert codes == [2, 2], told
    assert "  manifest of the data (SHA-256): " in told


def other_data(data: Path, rank: int) -> None:
    from diffmoe.training import agreement

    agreement.LAG = 1.0
    if rank == 1:
        sys.argv += [f"data.path={data}"]
