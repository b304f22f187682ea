"""Shards whose samples have captions."""

from diffmoe.data.captions import Captions
from diffmoe.data.manifest import Manifest, TextContent
from diffmoe.data.packing import ShardWriter
from tests.helpers.shards import FIELDS, array_of

NUMBERS = ["one", "two", "three"]


def captions_of(index: int) -> list[str]:
    """One to three captions of different lengths."""
    line = f"a red {NUMBERS[index % 3]}"
    return [line, f"{line} left of a blue one", NUMBERS[index % 3]][: 1 + index % 3]


def pack(directory, counts=(9, 8)) -> Manifest:
    text = TextContent(encoder="bytes", length=40)
    with ShardWriter(directory, list(counts), **FIELDS, text=text) as writer:
        for i in range(sum(counts)):
            array = array_of(i, (2, 4, 4))
            writer.add(f"{i:05d}", i % 7, array, captions=Captions(captions_of(i)))
    return writer.manifest
