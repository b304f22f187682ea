"""Streams over small shards, whole and damaged."""

from diffmoe.data.stream import LatentStream

SEED, LANES, N = 3, 2, 2


def stream(directory, manifest, told=None, **options):
    options = {"my_lanes": range(LANES), "max_bad_shards": 2, **options}
    return LatentStream(
        directory,
        manifest,
        lanes=LANES,
        samples_per_lane=N,
        seed=SEED,
        report=(told if told is not None else []).append,
        **options,
    )


def damage(directory, shard, how):
    path = directory / f"{shard:06d}.tar"
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        content[600] ^= 1
        path.write_bytes(content)
