"""Pieces of flattened global tensors in torch.distributed.checkpoint, hashed while being written.

Each rank writes the ranges that it owns, and reads the ranges that it will own, whichever ranks
wrote them.
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
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from diffmoe.checkpoints.checksums import Checksums
from diffmoe.checkpoints.index import FILE_NAME, Index, read_index
from diffmoe.errors import UserError
from diffmoe.files import check_unpacked


class Piece(Tensor):
    """A 1-D piece of a flattened global tensor, in the protocol of torch.distributed.checkpoint.

    start: index of its first element in the flattened tensor. total: elements of that tensor.
    """

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
    """Copies of pieces in host memory (pinned for those on a GPU, so that copies overlap).

    The memory is reused by the next copy: touching fresh pages takes longer than copying.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        """dtype: of copied pieces, default their own. Other tensors keep their type."""
        self.dtype = dtype
        self._held: dict[str, Tensor] = {}

    def take(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors and pieces. The result is overwritten by the next call.

        Every call must have the same names and shapes.
        """
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


def write_pieces(
    state: dict[str, Tensor], folder: Path, group: dist.ProcessGroup | None
) -> Checksums:
    """Write all ranks' pieces, fsynced. Returns the checksums of the files that this rank wrote.

    Raises OSError on every rank if writing failed on one.
    """
    writer = _IndexWriter(folder, sync_files=True)
    writer.fs = files = _HashingFileSystem()
    try:
        dcp.save(state, storage_writer=writer, process_group=group)
    except dcp.api.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"rank {rank}: {cause}") from error
    return files.checksums


def read_pieces(folder: Path, state: dict[str, Tensor], alone: bool = False) -> None:
    """Fill tensors and pieces in place.

    alone: read in this process only, even if there is a process group. Raises UserError if the
    checkpoint is damaged or does not hold what is asked for; without `alone`, on every rank.
    """
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
    """Reads our index, once per reader; torch's own class would unpickle one."""

    _index: Metadata | None = None

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Type, size and pieces of each tensor."""
        stored = self.read_metadata().state_dict_metadata
        return {n: item for n, item in stored.items() if isinstance(item, TensorStorageMetadata)}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index is None:
            self._index = read_index(Path(self.path)).metadata()
        return self._index

    def _slice_file(self, file: IO[bytes], place: Any) -> IO[bytes]:
        """The bytes of one piece, as torch.save wrote them; refuses compressed ones."""
        piece = io.BufferedReader(_FilePart(file.fileno(), place.offset, place.length))
        with zipfile.ZipFile(piece) as archive:
            check_unpacked(archive, place.length)
        piece.seek(0)
        return piece


class _IndexWriter(dcp.FileSystemWriter):
    """Writes the pieces as torch does, with our index instead of its pickle."""

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        metadata.storage_data = {
            result.index: result.storage_data for of_rank in results for result in of_rank
        }
        with self.fs.create_stream(Path(self.path) / FILE_NAME, "wb") as file:
            file.write(Index.of(metadata).model_dump_json().encode())
            os.fsync(file.fileno())


class _PieceLoadPlanner(dcp.DefaultLoadPlanner):
    """Plans reads of pieces; the default planner refuses a piece smaller than its tensor."""

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None  # set by set_up_planner
        items = []
        for name, value in self.state_dict.items():
            stored = self.metadata.state_dict_metadata.get(name)
            assert not isinstance(stored, BytesStorageMetadata)  # our index holds tensors alone
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
                raise UserError(f"part of {name} is missing from the checkpoint's files")
            items += found
        return LoadPlan(items)


class _FilePart(io.RawIOBase):
    """Some bytes of an open file, as a file object of their own.

    number: the open file's descriptor. start, length: in bytes.
    """

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
    """Hashes what it is given to write, so that checksums describe that and not what was stored."""

    def __init__(self) -> None:
        self.checksums: Checksums = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            hashed = _HashedFile(stream)
            try:
                yield hashed
            except Exception:
                if hashed.error is None:
                    raise
                # torch's zip writer reports a full disk as an error of its own.
                raise OSError(f"{hashed.error.strerror}: {path}") from None
        digest = hashed.sha256.hexdigest()
        self.checksums[Path(path).name] = {"bytes": hashed.size, "sha256": digest}

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.checksums[Path(new_path).name] = self.checksums.pop(Path(path).name)


class _HashedFile:
    """A file that is written from start to end and hashed on the way.

    error: of a write that failed.
    """

    def __init__(self, file: Any) -> None:
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
