"""Images in tables: data sets of Hugging Face on disk, as parquet or Arrow files.

`save_to_disk` leaves DIR/SPLIT/data-*.arrow, or DIR/data-*.arrow; a repository of the hub holds
DIR/data/SPLIT-*.parquet. What the columns are is in the schema, as `datasets` writes it, or plain
from their types.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from diffmoe.data.captions import txt_member
from diffmoe.errors import UserError
from diffmoe.files import contained, refuse_special
from diffmoe.prepare.image_folders import ImageItem, ImageSource, images_of_tar, numbered
from diffmoe.prepare.plain_tars import PlainTars, pyarrow_for, too_large, unpacked_limit
from diffmoe.redaction import printable

_ENDINGS = (".parquet", ".arrow")
_SPLITS = "dataset_dict.json"
_NUMBERED = re.compile(r"-\d+-of-\d+.*")  # of the files of a split
_FILE_MAGIC = b"ARROW1\0\0"  # before the stream in Arrow's file format


class Columns(NamedTuple):
    """Names of the columns that are read; without label and text all images are of one class."""

    image: str
    label: str | None = None
    text: str | None = None


def holds_tables(folder: str | Path) -> bool:
    """Whether it is a data set of Hugging Face on disk."""
    root = Path(folder)
    return (root / _SPLITS).is_file() or any(map(_tables_in, (root, root / "data")))


def find_table_images(
    images: ImageSource, plain: PlainTars
) -> tuple[list[ImageItem], list[str] | None]:
    """All images of one split of a data set, as `find_images` gives them.

    plain: where the rows lie while they are packed. Class names are None if there are captions, or
    labels without names. Raises UserError.
    """
    root = Path(images.folder)
    files = [_regular(root, file, images.follow_links) for file in _files_of(root, images.split)]
    columns, class_names = _columns(root, files[0], images)
    tars = plain.written(files, partial(_write_tar, columns=columns), str(columns))
    items: list[ImageItem] = []
    for file, tar in zip(files, tars, strict=True):
        items += images_of_tar(tar, root, str(file.relative_to(root)), images.captioned)
    return numbered(items), class_names


def _regular(root: Path, file: Path, follow_links: bool) -> Path:
    try:
        refuse_special(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    return file if follow_links else contained(root, str(file.relative_to(root)))


def _tables_in(folder: Path) -> list[Path]:
    """Those with images: metadata.parquet stands beside images in files."""
    try:
        tables = [file for file in folder.iterdir() if file.suffix in _ENDINGS]
    except OSError:  # no folder, or none that may be listed
        return []
    return sorted(file for file in tables if not file.stem.startswith(("metadata", "cache-")))


def _files_of(root: Path, split: str | None) -> list[Path]:
    """The files of a split, which may be left out if there is one alone."""
    splits: dict[str, list[Path]] = {}
    if (root / _SPLITS).is_file():
        for place in sorted(root.iterdir()):
            if tables := _tables_in(place):
                splits[place.name] = tables
    else:
        for file in _tables_in(root) or _tables_in(root / "data"):
            name = _NUMBERED.sub("", file.stem)
            splits.setdefault("" if name.isdecimal() else name, []).append(file)
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        names = ", ".join(map(printable, splits)) or "(none)"
        raise UserError(f"{root} holds the splits {names}; give one of them as --split")
    return splits[split]


def _columns(root: Path, file: Path, images: ImageSource) -> tuple[Columns, list[str] | None]:
    """The columns that are asked for or the only ones of their kind, and the names of the classes.

    Raises UserError for a column that is not there, not of its kind, or not told.
    """
    types = pyarrow_for(file).types
    with _reading(file):
        schema = _schema(file)
        fields = [(field.name, field.type) for field in schema]
    features = _features(schema)
    if images.captioned and "label" in images.columns:
        raise UserError("--columns label= does not go with --captions")
    if not images.captioned and "text" in images.columns:
        raise UserError("--columns text= needs --captions")

    def pick(kind: str, fitting: list[str], feature: str = "", way_out: str = "") -> str:
        """feature: what `datasets` calls the one that is meant, if there is one alone."""
        called = [name for name in fitting if features.get(name, {}).get("_type") == feature]
        likely = called or fitting
        chosen = images.columns.get(kind, likely[0] if len(likely) == 1 else None)
        if chosen not in fitting:
            of = ", ".join(map(printable, fitting)) or f"none of {', '.join(schema.names)} fits"
            raise UserError(
                f"{root}: which column is the {kind}? Give --columns {kind}=NAME ({of}){way_out}"
            )
        return chosen

    image = pick("image", [name for name, kind in fields if _is_image(types, kind)], "Image")
    if images.captioned:
        text = pick("text", [name for name, kind in fields if _is_text(types, kind)])
        return Columns(image, text=text), None
    if len(fields) == 1 or images.columns.get("label") == "":
        return Columns(image), [printable(root.resolve().name)]
    label = pick(
        "label",
        [name for name, kind in fields if types.is_integer(kind)],
        "ClassLabel",
        ", or label= if all are of one class, or --captions",
    )
    names = features.get(label, {}).get("names")
    return Columns(image, label), (
        [printable(str(name)) for name in names] if isinstance(names, list) else None
    )


def _is_image(types: Any, kind: Any) -> bool:
    if types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _is_image(types, kind.field(place).type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_text(types: Any, kind: Any) -> bool:
    """Whether it is one caption or several."""
    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What `datasets` says of the columns; nothing if others have written the file."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: of for name, of in features.items() if isinstance(of, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _write_tar(file: Path, stream: BinaryIO, columns: Columns) -> None:
    """The rows of a table as members of a tar, by their number: an image, and cls or txt."""
    limit = unpacked_limit(file)
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, row in enumerate(_rows(file, columns)):
            image = row[columns.image]
            data = image.get("bytes") if isinstance(image, dict) else image
            members = {"png": data or b""}  # whatever it is; an empty one is a bad image
            if columns.text is not None:
                members["txt"] = _lines(row[columns.text])
            else:
                members["cls"] = b"%d" % _label(file, number, row, columns.label)
            for kind, content in members.items():
                limit -= len(content)
                if limit < 0:
                    raise too_large(file)
                info = tarfile.TarInfo(f"{number:08d}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _label(file: Path, number: int, row: dict[str, Any], column: str | None) -> int:
    if column is None:
        return 0
    label = row[column]
    if label is None or label < 0:
        raise UserError(
            f"{file}, row {number}: {printable(column)} is {label}, no class number; choose "
            "another --split, or --columns label= if all are of one class"
        )
    return label


def _lines(text: str | list[str] | None) -> bytes:
    """A caption is one line, whatever it holds."""
    captions = [text] if isinstance(text, str) else text or []
    return txt_member([" ".join(caption.split()) for caption in captions if caption])


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """What pyarrow raises on a damaged file becomes a UserError that names it."""
    pyarrow = pyarrow_for(file)
    try:
        yield
    # Damaged metadata may lack a column, or ask for any memory.
    except (OSError, ValueError, KeyError, MemoryError, pyarrow.ArrowException) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} cannot be read ({reason}); copy it again") from None


def _schema(file: Path) -> Any:
    if file.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_schema(file)
    with _arrow_stream(file) as reader:
        return reader.schema


def _rows(file: Path, columns: Columns) -> Iterator[dict[str, Any]]:
    """The rows of a table, with the columns that are read. Raises UserError."""
    names = [name for name in columns if name is not None]
    batches = _parquet_batches(file, names) if file.suffix == ".parquet" else _arrow_batches(file)
    while True:
        with _reading(file):
            batch = next(batches, None)
            if batch is None:
                return
            batch = batch.select(names)
            batch.validate(full=True)  # a damaged one may point anywhere
        for row in range(batch.num_rows):
            with _reading(file):
                found = batch.slice(row, 1).to_pylist()
            yield from found


def _parquet_batches(file: Path, names: list[str]) -> Iterator[Any]:
    from pyarrow import parquet

    # One row at a time: a page of a few bytes can hold any number of large ones.
    with parquet.ParquetFile(file, pre_buffer=False) as opened:
        yield from opened.iter_batches(1, columns=names, use_threads=False)


def _arrow_batches(file: Path) -> Iterator[Any]:
    with _arrow_stream(file) as reader:
        yield from reader


def _arrow_stream(file: Path) -> Any:
    """Of the stream that `datasets` writes, or of the one in Arrow's file format."""
    import pyarrow

    source = pyarrow.memory_map(str(file))
    source.seek(len(_FILE_MAGIC) if source.read(len(_FILE_MAGIC)) == _FILE_MAGIC else 0)
    return pyarrow.ipc.open_stream(source)
