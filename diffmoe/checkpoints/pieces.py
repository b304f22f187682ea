"""Pieces of flattened global tensors in torch.distributed.checkpoint, hashed as they are written.

A rank hands over the ranges that it owns and asks for those that it will own; which rank wrote what
does not matter.
"""

import contextlib
import hashlib
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import LoadPlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from diffmoe.checkpoints.index import FILE_NAME, Index, read_index
from diffmoe.errors import UserError
from diffmoe.files import check_unpacked

# name -> {"bytes": size, "sha256": hex}
Hashes = dict[str, dict[str, Any]]


class Piece(Tensor):
    """A 1-D piece of a flattened global tensor, in the protocol of torch.distributed.checkpoint."""

    start: int
    total: int

    @staticmethod
    def of(data: Tensor, start: int, total: int) -> "Piece":
        piece = data.detach().as_subclass(Piece)
        piece.start, piece.total = start, total
        return piece

    @staticmethod
    def whole(tensor: Tensor) -> "Piece":
        flat = tensor.detach().view(-1)
        return Piece.of(flat, 0, flat.numel())

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([self.start]), torch.Size([len(self)]))]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        chunk = self.__create_chunk_list__()[0]
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, torch.Size([self.total])),
            )
        ]

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self.as_subclass(Tensor)


class HostCopy:
    """Copies pieces to host memory of their own (pinned beside a GPU, so that copies overlap).

    The memory is kept from one copy to the next: fresh pages cost more than the copying.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        """dtype: of copied pieces; what is no piece stays as it is."""
        self.dtype = dtype
        self._held: dict[str, Tensor] = {}

    def take(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same names and values; valid until the next call, which must have the same names."""
        copies: dict[str, Tensor] = {}
        for name, tensor in state.items():
            source, dtype = tensor.detach().as_subclass(Tensor), tensor.dtype
            if isinstance(tensor, Piece):
                dtype = self.dtype or dtype
            if name not in self._held:
                pinned = source.is_cuda
                self._held[name] = torch.empty(source.shape, dtype=dtype, pin_memory=pinned)
            copy = self._held[name].copy_(source, non_blocking=True)
            if isinstance(tensor, Piece):
                copy = Piece.of(copy, tensor.start, tensor.total)
            copies[name] = copy
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies


def write(state: dict[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> Hashes:
    """Write all ranks' pieces, fsynced; the hashes of the files that this rank wrote.

    Raises OSError on every rank where one rank's writing failed.
    """
    writer = _IndexWriter(folder, sync_files=True)
    writer.fs = _HashingFileSystem()
    try:
        dcp.save(state, storage_writer=writer, process_group=group)
    except dcp.api.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"rank {rank}: {cause}") from error
    return writer.fs.hashes


def read(folder: Path, state: dict[str, Tensor], alone: bool = False) -> None:
    """Fill tensors and pieces in place. alone: in this process, whatever group there is."""
    try:
        dcp.load(
            state,
            storage_reader=IndexReader(folder),
            planner=_PieceLoadPlanner(),
            no_dist=alone,
        )
    except dcp.api.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        for cause in causes:
            if isinstance(cause, UserError):
                named = str(cause).startswith(str(folder))
                raise UserError(str(cause) if named else f"{folder}: {cause}") from None
        raise UserError(
            f"{folder} is damaged ({causes[0]}); take an older checkpoint by its PATH, "
            "step-XXXXXXXX"
        ) from error


class IndexReader(dcp.FileSystemReader):
    """Reads an index of ours, once; torch would unpickle one of its own."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index is None:
            self._index = read_index(Path(self.path)).metadata()
        return self._index

    def _slice_file(self, file: IO[bytes], place: Any) -> IO[bytes]:
        """The bytes of one piece, a file of torch.save, which must not be packed."""
        piece = io.BufferedReader(_FilePart(file.fileno(), place.offset, place.length))
        with zipfile.ZipFile(piece) as archive:
            check_unpacked(archive, place.length)
        piece.seek(0)
        return piece


class _IndexWriter(dcp.FileSystemWriter):
    """Writes the pieces as torch does, and an index of ours."""

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        metadata.storage_data = {
            result.index: result.storage_data for of_rank in results for result in of_rank
        }
        with self.fs.create_stream(Path(self.path) / FILE_NAME, "wb") as file:
            file.write(Index.of(metadata).model_dump_json().encode())
            os.fsync(file.fileno())


class _PieceLoadPlanner(dcp.DefaultLoadPlanner):
    """The default planner compares a piece's size with the whole tensor's, and refuses."""

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, value in self.state_dict.items():
            stored = self.metadata.state_dict_metadata.get(name)
            total = value.total if isinstance(value, Piece) else value.numel()
            if stored is None or stored.size.numel() != total:
                size = "nothing" if stored is None else f"{stored.size.numel()} numbers"
                raise UserError(f"the checkpoint holds {size} for {name}, this model has {total}")
            if isinstance(value, Piece):
                chunks = value.__create_chunk_list__()
            else:
                zeros = torch.Size([0] * value.dim())
                chunks = [ChunkStorageMetadata(zeros, value.shape)]
            found = create_read_items_for_chunk_list(name, stored, chunks)
            if sum(item.lengths.numel() for item in found) < value.numel():
                raise UserError(f"part of {name} is in no file of the checkpoint")
            items += found
        return LoadPlan(items)


class _FilePart(io.RawIOBase):
    """Some bytes of an open file as a file of their own."""

    def __init__(self, number: int, start: int, length: int) -> None:
        self.number, self.start, self.length, self.position = number, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        self.position = max(0, origin + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer)[: max(0, self.length - self.position)]
        read = os.preadv(self.number, [wanted], self.start + self.position) if wanted else 0
        self.position += read
        return read


class _HashingFileSystem(FileSystem):
    """Hashes what is handed over for writing, so that a later read is held against that."""

    def __init__(self) -> None:
        self.hashes: Hashes = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            hashed = _HashedFile(stream)
            try:
                yield hashed
            except Exception:
                if hashed.error is None:
                    raise
                # torch's zip writer tells a full disk as a failure of its own.
                raise OSError(f"{hashed.error.strerror}: {path}") from None
        self.hashes[Path(path).name] = {"bytes": hashed.size, "sha256": hashed.sha256.hexdigest()}

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.hashes[Path(new_path).name] = self.hashes.pop(Path(path).name)


class _HashedFile:
    """A file that can only be appended to."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.size += memoryview(data).nbytes
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def fileno(self) -> int:
        self.file.flush()
        return self.file.fileno()

    def tell(self) -> int:
        return self.file.tell()

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()
