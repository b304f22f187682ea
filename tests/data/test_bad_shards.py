"""A stream over shards that fail: nothing hangs, nothing is lost without a word."""

import subprocess
import sys
from itertools import islice

import pytest

from diffmoe.data.fetching import Fetch
from diffmoe.data.lanes import lane_shards
from diffmoe.errors import UserError
from tests.helpers.processes import ROOT
from tests.helpers.shards import damage
from tests.helpers.streams import RAGGED as COUNTS
from tests.helpers.streams import open_stream

SEED, LANES, N = 3, 2, 2
FIRST = [sum(COUNTS[:shard]) for shard in range(len(COUNTS))]


def stream(directory, manifest, reported=None, my_lanes=range(LANES), **options):
    options = {"max_bad_shards": 2, "lanes": LANES, "seed": SEED, **options}
    report = (reported if reported is not None else []).append
    return open_stream(directory, manifest, my_lanes, N, report=report, **options)


def ids(batches):
    return [[int(x) for x in batch.latents[:, 0, 0, 0].abs().round()] for batch in batches]


def of_lane(lane, rows):
    return [i for row in rows for i in row[lane * N : (lane + 1) * N]]


STEPS = 40  # five samples' epochs of each lane
# The first, a middle and the last shard of lane 0's first epoch.
MINE = lane_shards(SEED, 0, 0, LANES, len(COUNTS))


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "flipped"])
@pytest.mark.parametrize("bad", [MINE[0], MINE[1], MINE[-1]])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_shard_stands_in_and_all_the_rest_keeps_its_place(
    tmp_path, pack, how, bad, workers
):
    manifest = pack(tmp_path, COUNTS)
    whole = ids(islice(stream(tmp_path, manifest), STEPS))
    damage(tmp_path, bad, how)
    told = []
    damaged = stream(tmp_path, manifest, told, workers=workers)
    seen = ids(islice(damaged, STEPS))
    lost = set(range(FIRST[bad], FIRST[bad] + COUNTS[bad]))
    stand_ins = set()
    for lane in range(LANES):
        for wanted, got in zip(of_lane(lane, whole), of_lane(lane, seen), strict=True):
            assert got not in lost
            if wanted in lost:
                stand_ins.add(got)
            else:
                assert got == wanted
    assert stand_ins
    assert len(told) == 1
    assert f"{bad:06d}.tar cannot be read" in told[0]
    assert "1 of data.max_bad_shards=2" in told[0]
    assert list(damaged.bad_shards) == [f"{tmp_path}/{bad:06d}.tar"]


@pytest.mark.parametrize("done", range(1, 24))
def test_a_resume_anywhere_goes_on_with_the_same_stand_ins(tmp_path, pack, done):
    manifest = pack(tmp_path, COUNTS)
    damage(tmp_path, MINE[1], "flipped")
    damage(tmp_path, MINE[2], "missing")  # the stand-in itself is bad
    whole = ids(islice(stream(tmp_path, manifest), 24))
    resumed = stream(tmp_path, manifest, clock=done * LANES * N)
    assert ids(islice(resumed, 24 - done)) == whole[done:]
    lanes = [ids(islice(stream(tmp_path, manifest, my_lanes=[lane]), 24)) for lane in range(LANES)]
    assert [a + b for a, b in zip(*lanes, strict=True)] == whole


def test_a_shard_that_heals_is_used_again(tmp_path, pack):
    manifest = pack(tmp_path, COUNTS)
    whole = ids(islice(stream(tmp_path, manifest), STEPS))
    path = tmp_path / f"{MINE[0]:06d}.tar"
    path.rename(tmp_path / "away")
    batches = iter(stream(tmp_path, manifest))
    next(batches)
    (tmp_path / "away").rename(path)
    rest = ids(islice(batches, STEPS - 1))
    assert rest[-20:] == whole[-20:]


@pytest.mark.parametrize("workers", [0, 2])
def test_more_bad_shards_than_allowed_stop_the_stream(tmp_path, pack, workers):
    manifest = pack(tmp_path, COUNTS)
    for bad in (0, 3, 5):
        damage(tmp_path, bad, "flipped")
    told = []
    with pytest.raises(UserError, match=r"set data\.max_bad_shards \(now 2\)"):
        list(islice(stream(tmp_path, manifest, told, workers=workers), STEPS))
    assert len(told) <= 2
    assert ids(islice(stream(tmp_path, manifest, max_bad_shards=3), 3))


@pytest.mark.timeout(60)
def test_a_lane_without_any_readable_shard_ends_the_stream(tmp_path, pack):
    manifest = pack(tmp_path, COUNTS)
    for bad in range(len(COUNTS)):
        damage(tmp_path, bad, "truncated")
    with pytest.raises(UserError, match="no shard of lane 0 can be read"):
        next(iter(stream(tmp_path, manifest, max_bad_shards=100)))


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [0, 1])
def test_pipes_with_one_that_stalls(tmp_path, pack, workers):
    manifest = pack(tmp_path, COUNTS)
    damage(tmp_path, MINE[1], "missing")
    expected = ids(islice(stream(tmp_path, manifest), 20))
    stalled = f"[ {{}} = {MINE[1]:06d}.tar ] && sleep 987"
    remote = manifest.model_copy(update={"location": f"pipe:{stalled}; cat {tmp_path}/{{}}"})
    told = []
    fetch = Fetch(allow_commands=True, stall_seconds=0.3, cache=str(tmp_path / "cache"))
    seen = ids(islice(stream("/", remote, told, workers=workers, fetch=fetch), 20))
    assert seen == expected
    assert len(told) == 1
    assert "no data for 0.3 seconds; 3 attempts" in told[0]
    assert len(list((tmp_path / "cache").glob("*.tar"))) >= len(COUNTS) - 2


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_ends_leaves_no_command_behind(tmp_path, pack, workers):
    """Its next shards stall, and nobody waits for them any more."""
    manifest = pack(tmp_path, COUNTS)
    first = {lane_shards(SEED, 0, lane, LANES, len(COUNTS))[0] for lane in range(LANES)}
    good = " ".join(f"{shard:06d}.tar" for shard in first)
    command = f"case '{good}' in *{{}}*) cat {tmp_path}/{{}};; *) sleep 986;; esac"
    remote = manifest.model_copy(update={"location": f"pipe:{command}"})
    script = (
        "import sys; from diffmoe.data.manifest import Manifest; "
        "from tests.helpers.streams import open_stream; "
        "from diffmoe.data.fetching import Fetch; "
        "manifest = Manifest.model_validate_json(sys.argv[1]); "
        f"batches = iter(open_stream('/', manifest, range({LANES}), {N}, lanes={LANES}, "
        f"seed={SEED}, workers={workers}, fetch=Fetch(allow_commands=True))); next(batches)"
    )
    arguments = [sys.executable, "-c", script, remote.model_dump_json()]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert f"cat {tmp_path}" not in listed  # its shells
