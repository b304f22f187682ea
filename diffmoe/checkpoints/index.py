"""index.json of a checkpoint: the type and size of every tensor, and where its pieces are stored.

torch.distributed.checkpoint uses a pickle for this, which can run commands. Ours is read as data
and checked against the files beside it, so that a damaged index cannot make us read more than they
hold. Older checkpoints have torch's pickle, see old_index.py.
"""

from collections import Counter
from math import prod
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from diffmoe.checkpoints.old_index import OLD_FILE_NAME, read_old_index
from diffmoe.errors import UserError
from diffmoe.files import read_json, refuse_special

FILE_NAME = "index.json"
_Number = Annotated[int, Field(ge=0, lt=1 << 53)]
_Sides = Annotated[tuple[_Number, ...], Field(max_length=8)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StoredPiece(_Part):
    """A block of a tensor, as torch.save writes it: `bytes` of a file, beginning at byte `at`.

    start, size: of the block in the whole tensor, per dimension.
    """

    start: _Sides
    size: _Sides
    file: str = Field(pattern=r"^[A-Za-z0-9_]\w*\.distcp$")
    at: _Number
    bytes: _Number


class StoredTensor(_Part):
    """dtype: torch's name for it. shape: of the whole tensor."""

    dtype: Literal["float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool"]
    shape: _Sides
    pieces: tuple[StoredPiece, ...]


class Index(_Part):
    """The tensors by name, in the order of saving."""

    version: Literal[1] = 1
    tensors: dict[str, StoredTensor]

    @classmethod
    def of(cls, metadata: Metadata) -> "Index":
        """From what torch has gathered about all ranks' pieces."""
        places = metadata.storage_data
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)  # nothing else is saved
            pieces = []
            for chunk in stored.chunks:
                place = places[MetadataIndex(name, chunk.offsets)]
                pieces.append(
                    StoredPiece(
                        start=tuple(chunk.offsets),
                        size=tuple(chunk.sizes),
                        file=place.relative_path,
                        at=place.offset,
                        bytes=place.length,
                    )
                )
            dtype = str(stored.properties.dtype).removeprefix("torch.")
            tensors[name] = StoredTensor.model_validate(
                {"dtype": dtype, "shape": tuple(stored.size), "pieces": pieces}
            )
        return cls(tensors=tensors)

    def metadata(self) -> Metadata:
        """The same, as torch.distributed.checkpoint takes it."""
        state: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        places = {}
        for name, stored in self.tensors.items():
            chunks = []
            for piece in stored.pieces:
                chunk = ChunkStorageMetadata(torch.Size(piece.start), torch.Size(piece.size))
                chunks.append(chunk)
                place = _StorageInfo(piece.file, piece.at, piece.bytes)
                places[MetadataIndex(name, chunk.offsets)] = place
            properties = TensorProperties(dtype=getattr(torch, stored.dtype))
            state[name] = TensorStorageMetadata(properties, torch.Size(stored.shape), chunks)
        return Metadata(state_dict_metadata=state, storage_data=places)

    def check_files(self, folder: Path) -> None:
        """Raises ValueError for files that are missing or too small for their pieces."""
        used: Counter[str] = Counter()
        for name, stored in self.tensors.items():
            itemsize = getattr(torch, stored.dtype).itemsize
            for piece in stored.pieces:
                if not (
                    len(piece.start) == len(piece.size) == len(stored.shape)
                    and all(map(_within, piece.start, piece.size, stored.shape))
                    and prod(piece.size) * itemsize <= piece.bytes
                ):
                    raise ValueError(
                        f"a piece of {name}, {stored.shape}, begins at {piece.start} and has the "
                        f"size {piece.size} in {piece.bytes} bytes of {piece.file}"
                    )
                used[piece.file] += piece.bytes
        ends = sorted((p.file, p.at + p.bytes) for t in self.tensors.values() for p in t.pieces)
        for file, end in dict(ends).items():  # the last piece of each file
            try:
                refuse_special(folder / file)
                size = (folder / file).stat().st_size
            except OSError as error:
                raise ValueError(f"{file} cannot be read: {error.strerror}") from None
            if size < max(end, used[file]):
                raise ValueError(f"{file} has {size} bytes, its pieces {max(end, used[file])}")


def read_index(folder: Path) -> Index:
    """The index of a checkpoint, in the present or the old format.

    Every file that it names exists, is regular, and is large enough for its pieces. Raises
    UserError naming the file and what is wrong with it.
    """
    file = folder / FILE_NAME
    if not file.exists() and (folder / OLD_FILE_NAME).exists():
        file = folder / OLD_FILE_NAME
    try:
        values = read_json(file) if file.name == FILE_NAME else read_old_index(file)
        index = Index.model_validate(values)
        index.check_files(folder)
        return index
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{file.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (UserError, ValueError) as error:
        reason = str(error)
    raise UserError(
        f"{folder} is damaged ({reason}); take an older checkpoint by its PATH, step-XXXXXXXX"
    )


def _within(start: int, size: int, side: int) -> bool:
    return start + size <= side
