"""The positions of a tar's members, so that each can be read without the others."""

import os
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, cast

from webdataset.tariterators import base_plus_ext

MEMBER_LIMIT = 256 << 20  # bytes of a latent, or of the features of a sample's captions
_BLOCK = 512
_META_LIMIT = 1 << 20  # bytes of long names and the like between members
_META = re.compile(r"__[^/]*__($|/)")  # names that webdataset skips


class Member(NamedTuple):
    """A file in a tar: `size` bytes at `offset`."""

    name: str
    offset: int
    size: int


class Entry(NamedTuple):
    """The members of one sample, by extension."""

    key: str
    members: dict[str, Member]


def read_member(file: int, member: Member) -> bytes:
    """The bytes of a member. file: descriptor of the open tar.

    Raises ValueError if the member is larger than MEMBER_LIMIT.
    """
    if member.size > MEMBER_LIMIT:
        raise ValueError(f"{member.name} has {member.size:,} bytes; the limit is {MEMBER_LIMIT:,}")
    return os.pread(file, member.size, member.offset)


def tar_members(file: int) -> list[Member]:
    """The regular files of an uncompressed tar, in order. file: descriptor of the open tar.

    Raises ValueError if it is not a tar or is cut off.
    """
    # tarfile is about ten times slower, so the plain headers of ordinary shards are read here.
    members: list[Member] = []
    position, end = 0, os.fstat(file).st_size
    while True:
        header = os.pread(file, _BLOCK, position)
        if len(header) < _BLOCK:
            raise ValueError(f"not a tar, or cut off after {len(members)} members")
        if header.count(0) == _BLOCK:
            return members
        size = header[124:136].rstrip(b" \0")
        plain = header[257:262] == b"ustar" and header[156:157] in (b"0", b"\0")
        if not plain or header[345] or not size.isdigit():
            return _members_by_tarfile(file)
        member = Member(
            header[:100].rstrip(b"\0").decode(errors="surrogateescape"),
            position + _BLOCK,
            int(size, 8),
        )
        position = member.offset + -(-member.size // _BLOCK) * _BLOCK
        if position > end:
            raise ValueError(f"cut off inside {member.name}, after {len(members)} complete members")
        members.append(member)


def tar_entries(file: int) -> list[Entry]:
    """A tar's samples as webdataset groups them: adjacent members of one name up to a dot.

    Raises ValueError as `tar_members` does, and for a sample with two members of one extension.
    """
    entries: list[Entry] = []
    for member in tar_members(file):
        key, extension = base_plus_ext(member.name)
        if key is None or _META.match(member.name):
            continue
        if not entries or entries[-1].key != key:
            entries.append(Entry(key, {}))
        if extension.lower() in entries[-1].members:
            raise ValueError(f"{member.name} occurs twice")
        entries[-1].members[extension.lower()] = member
    return entries


def _members_by_tarfile(file: int) -> list[Member]:
    """The same with the standard library, for long names, links, big sizes and other formats."""
    try:
        with os.fdopen(os.dup(file), "rb") as stream:
            stream.seek(0)
            with tarfile.open(fileobj=cast(BinaryIO, _Bounded(stream)), mode="r:") as tar:
                return list(_regular(tar))
    # Damaged headers raise errors of any kind.
    except Exception as error:
        raise ValueError(f"not an uncompressed tar ({error})") from None


def _regular(tar: tarfile.TarFile) -> Iterator[Member]:
    end = -1
    for member in tar:
        # Negative sizes would send tarfile back, in an endless loop.
        if member.size < 0 or member.offset <= end:
            raise ValueError(f"{member.name} has a size of {member.size}")
        end = member.offset
        if member.issparse():
            raise ValueError(f"{member.name} is a sparse file; write it without holes")
        if member.isreg():
            yield Member(member.name, member.offset_data, member.size)


class _Bounded:
    """A file object for tarfile, which would read into memory whatever size a header claims."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._file, self._ends = file.seek, file.tell, file, 0

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _META_LIMIT:
            raise ValueError(f"{size:,} bytes between its members")
        data = self._file.read(size)
        self._ends += len(data) < size
        if self._ends > 9:  # tarfile keeps reading at the end of the file
            raise ValueError("cut off")
        return data
