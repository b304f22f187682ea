"""Detects what a path holds and opens it as a source."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from diffmoe.conversion.foreign import Format, Options, foreign_source
from diffmoe.conversion.hugging_face import transformer_folder
from diffmoe.errors import UserError
from diffmoe.export.adapters import refuse_adapters
from diffmoe.export.exported_model import is_exported
from diffmoe.export.sources import Source, checkpoint_source, exported_source
from diffmoe.files import does_not_exist


@contextlib.contextmanager
def open_source(
    path: Path,
    weights: str = "ema",
    form: Format | None = None,
    options: Options | None = None,
) -> Iterator[Source]:
    """The source of any path that can be converted.

    weights, form, options: as of foreign_source and checkpoint_source. Raises UserError if the path
    does not exist or holds no model.
    """
    if not path.exists():
        raise UserError(f"{does_not_exist(path)}; give a run, a checkpoint, or a model")
    refuse_adapters(path)
    if is_exported(path):
        with exported_source(path) as source:
            yield source
    elif path.is_file() or form is not None or transformer_folder(path):
        with foreign_source(path, weights, form, options) as source:
            yield source
    else:
        with checkpoint_source(path, weights) as source:
            yield source
