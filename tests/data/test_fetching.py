import json
import os
import subprocess
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from diffmoe.data import fetching
from diffmoe.data.fetching import Fetch, ReadAhead, Unreadable, check_addresses, open_shard
from diffmoe.data.manifest import Manifest, Shard
from diffmoe.errors import UserError
from diffmoe.files import sha256_of
from diffmoe.prepare.checking import check_data
from tests.helpers.runs import pack

ALLOWED = Fetch(allow_commands=True)
CONTENT = os.urandom(3_000_000)


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "a b.tar"
    path.write_bytes(CONTENT)
    return Shard(name=path.name, samples=1, bytes=len(CONTENT), sha256=sha256_of(path))


def test_paths_and_pipes_give_the_same_file(tmp_path, shard):
    path = tmp_path / shard.name
    for address in [str(path), f"pipe:cat '{path}'", f"pipe:gzip -c '{path}' | gunzip -c"]:
        with open_shard(address, shard, ALLOWED) as file:
            assert os.pread(file.fileno(), len(CONTENT) + 1, 0) == CONTENT
    assert [file.name for file in tmp_path.iterdir()] == [shard.name]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("cat /nowhere/at/all", r"exited with status 1; 3 attempts"),
        ("exit 0", "truncated: 0 bytes read, 3000000 in the manifest"),
        ("head -c 2999999 '{}'", "truncated: 2999999 bytes read"),
        ("yes", "too long"),
        ("head -c 3000000 /dev/zero", "corrupt: sha256"),
        ("cat '{}'; exit 3", "exited with status 3"),
    ],
)
def test_a_pipe_that_fails_says_why(tmp_path, shard, command, reason):
    with pytest.raises(Unreadable, match=reason):
        open_shard("pipe:" + command.replace("{}", str(tmp_path / shard.name)), shard, ALLOWED)


def test_http_is_read_without_starting_a_program(tmp_path, shard):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        with open_shard(f"{base}/a%20b.tar", shard) as file:
            assert os.pread(file.fileno(), len(CONTENT), 0) == CONTENT
        with pytest.raises(Unreadable, match="HTTP Error 404"):
            open_shard(f"{base}/other.tar", shard, attempts=1)
        server.shutdown()


def test_an_unknown_scheme_says_so(shard):
    with pytest.raises(Unreadable, match="no gopen handler defined"):
        open_shard("nonsense://x", shard, ALLOWED)


@pytest.mark.parametrize(
    "command", ["sleep 987", "head -c 1000000 '{}'; sleep 987 | cat", "cat '{}' <&- | sleep 987"]
)
def test_a_stalled_pipe_is_given_up_with_all_its_processes(tmp_path, shard, command):
    address = "pipe:" + command.replace("{}", str(tmp_path / shard.name))
    with pytest.raises(Unreadable, match=r"no data for 0\.1 seconds; 2 attempts"):
        open_shard(address, shard, Fetch(allow_commands=True, stall_seconds=0.1), attempts=2)
    listed = subprocess.run(["ps", "-eo", "stat,args"], capture_output=True, text=True)
    alive = [line for line in listed.stdout.splitlines() if not line.startswith("Z")]
    assert not any("sleep 987" in line for line in alive)


def test_a_shard_that_comes_at_the_third_attempt_is_taken(tmp_path, shard):
    tries = tmp_path / "tries"
    address = f"pipe:echo >> {tries}; [ $(wc -l < {tries}) -ge 3 ] && cat '{tmp_path / shard.name}'"
    with open_shard(address, shard, ALLOWED) as file:
        assert len(file.read()) == len(CONTENT) or os.fstat(file.fileno()).st_size == len(CONTENT)
    tries.unlink()
    with pytest.raises(Unreadable, match="2 attempts"):
        open_shard(address, shard, ALLOWED, attempts=2)


def test_attempts_are_spaced(monkeypatch, shard):
    waits = []
    monkeypatch.setattr(fetching, "BACK_OFF", 1.0)
    monkeypatch.setattr(fetching.time, "sleep", waits.append)
    with pytest.raises(Unreadable, match="No such file or directory; 3 attempts"):
        open_shard("/nowhere/at/all", shard)
    assert waits == [1, 4]


def counting(tmp_path, shard) -> tuple[str, Path]:
    """A pipe that leaves a line for every time it is run."""
    log = tmp_path / "log"
    return f"pipe:echo >> {log}; cat '{tmp_path / shard.name}'", log


def test_the_cache_serves_what_it_holds(tmp_path, shard):
    address, log = counting(tmp_path, shard)
    fetch = Fetch(allow_commands=True, cache=str(tmp_path / "new" / "cache"))
    for _ in range(3):
        with open_shard(address, shard, fetch) as file:
            assert os.pread(file.fileno(), len(CONTENT), 0) == CONTENT
    assert len(log.read_text().splitlines()) == 1
    assert [f.name for f in (tmp_path / "new/cache").iterdir()] == [f"{shard.sha256}.tar"]


def test_what_has_gone_bad_in_the_cache_is_fetched_again(tmp_path, shard):
    address, log = counting(tmp_path, shard)
    fetch = Fetch(allow_commands=True, cache=str(tmp_path / "cache"))
    open_shard(address, shard, fetch).close()
    held = tmp_path / "cache" / f"{shard.sha256}.tar"
    for damage in (CONTENT[:-1], CONTENT[:-1] + b"x" if CONTENT[-1:] != b"x" else b"y", b""):
        held.write_bytes(damage)
        open_shard(address, shard, fetch).close()
        assert held.read_bytes() == CONTENT
    assert len(log.read_text().splitlines()) == 4


def test_the_cache_keeps_its_limit_and_the_youngest(tmp_path):
    cache, shards = tmp_path / "cache", []
    for index in range(4):
        path = tmp_path / f"{index}.tar"
        path.write_bytes(bytes([index]) * 1000)
        shards.append(Shard(name=path.name, samples=1, bytes=1000, sha256=sha256_of(path)))
    limit = Fetch(allow_commands=True, cache=str(cache), cache_gib=2500 / 2**30)

    def read(index):
        with open_shard(f"pipe:cat {tmp_path}/{index}.tar", shards[index], limit) as file:
            assert os.pread(file.fileno(), 1000, 0) == bytes([index]) * 1000
        time.sleep(0.02)  # file times have a grain

    def held():
        return sorted(i for i, s in enumerate(shards) if (cache / f"{s.sha256}.tar").exists())

    for index, expected in [(0, [0]), (1, [0, 1]), (0, [0, 1]), (2, [0, 2]), (3, [2, 3])]:
        read(index)
        assert held() == expected
    tight = limit._replace(cache_gib=999 / 2**30)  # less than a shard: used, not kept
    open_shard(f"pipe:cat {tmp_path}/0.tar", shards[0], tight).close()
    assert held() == [2, 3]
    assert list(cache.glob("*.tmp")) == []


def test_rests_of_killed_processes_leave_the_cache(tmp_path, shard):
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, age in [("old.tmp", 7200), ("new.tmp", 5)]:
        (cache / name).write_bytes(b"torn")
        os.utime(cache / name, (time.time() - age,) * 2)
    open_shard(
        f"pipe:cat '{tmp_path / shard.name}'", shard, Fetch(allow_commands=True, cache=str(cache))
    ).close()
    assert sorted(f.name for f in cache.iterdir() if f.suffix == ".tmp") == ["new.tmp"]


def test_reading_ahead_gives_the_file_or_the_reason(tmp_path, shard):
    with ReadAhead(str(tmp_path / shard.name), shard, Fetch()).result() as file:
        assert os.pread(file.fileno(), 10, 0) == CONTENT[:10]
    with pytest.raises(Unreadable, match="No such file"):
        ReadAhead("/nowhere", shard, Fetch()).result()
    abandoned = ReadAhead(str(tmp_path / shard.name), shard, Fetch())
    abandoned.close()


def test_what_hangs_where_no_pipe_can_tell_is_given_up_too(monkeypatch, shard):
    """As a file system that does not answer: the thread stays where it is."""
    answer = threading.Event()

    def hang(*_):
        answer.wait(30)
        raise Unreadable("too late")

    monkeypatch.setattr(fetching, "_open_once", hang)
    with pytest.raises(Unreadable, match="no progress for"):
        ReadAhead("/nfs/x", shard, Fetch(stall_seconds=0.05)).result()
    answer.set()


@pytest.mark.parametrize(
    ("location", "told"),
    [
        ("http://me:secret@127.0.0.1:9/{}?token=secret", "127.0.0.1:9"),
        ("pipe:false -H 'Authorization: secret' {}", "pipe:false"),
    ],
)
def test_secrets_of_an_address_are_not_told(tmp_path, location, told):
    folder = pack(tmp_path / "data", [3])
    manifest = json.loads((folder / "manifest.json").read_text()) | {"location": location}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = check_data(folder, None, fetch=ALLOWED).problems
    assert told in problem
    assert "secret" not in problem
    if location.startswith("pipe:"):
        with pytest.raises(UserError, match="would start a program") as refused:
            check_addresses(folder, Manifest.load(folder), Fetch())
        assert "secret" not in str(refused.value)
