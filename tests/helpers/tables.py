"""Data sets of Hugging Face on disk, as the library `datasets` writes them."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.shards import photograph

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra arrow)")
from pyarrow import parquet  # noqa: E402

NAMES = ["ant", "bee", "cat"]
LABELS = [0, 0, 0, 1, 1, 2, 2]  # of the first pictures
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def png(index: int) -> bytes:
    stream = io.BytesIO()
    photograph(index).save(stream, "png")
    return stream.getvalue()


def cells(indices: range) -> list[dict[str, Any]]:
    """Of a column of images."""
    return [{"bytes": png(index), "path": f"{index}.png"} for index in indices]


def table(columns: dict[str, Any], features: dict[str, Any]) -> Any:
    """A table whose schema says what `datasets` would say of the columns."""
    told = json.dumps({"info": {"features": features}}).encode()
    return pa.table(columns).replace_schema_metadata({b"huggingface": told})


def labeled(first: int = 0, last: int = len(LABELS)) -> Any:
    """Pictures `first` to `last` with their classes."""
    rows = range(first, last)
    features = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
    labels = pa.array([LABELS[row % len(LABELS)] for row in rows], pa.int64())
    return table({"image": pa.array(cells(rows), IMAGE), "label": labels}, features)


def captioned(lines: list[list[str]]) -> Any:
    """As many pictures as captions, each with all of its captions and with the first alone."""
    text = {"dtype": "string", "_type": "Value"}
    features = {
        "picture": {"_type": "Image"},
        "captions": {"feature": text, "_type": "List"},
        "first": text,
        "width": {"dtype": "int32", "_type": "Value"},
    }
    columns = {
        "picture": pa.array(cells(range(len(lines))), IMAGE),
        "captions": pa.array(lines, pa.list_(pa.string())),
        "first": pa.array([each[0] for each in lines]),
        "width": pa.array([24] * len(lines), pa.int32()),
    }
    return table(columns, features)


def write_parquet(file: Path, rows: Any, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(rows, file, **{"row_group_size": 3, **options})


def write_arrow(file: Path, rows: Any, of_files: bool = False) -> None:
    """The stream that `save_to_disk` writes, or Arrow's file format."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.ipc.new_file if of_files else pa.ipc.new_stream
    with kind(str(file), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=2)


def save_to_disk(root: Path, splits: dict[str, list[Any]]) -> None:
    """Each split in files of its own, as a DatasetDict is saved."""
    for split, parts in splits.items():
        for number, part in enumerate(parts):
            write_arrow(root / split / f"data-{number:05d}-of-{len(parts):05d}.arrow", part)
        (root / split / "state.json").write_text("{}")
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
