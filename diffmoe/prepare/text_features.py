"""An encoder's features beside the captions of shards that are there."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from diffmoe.config import BYTES
from diffmoe.data.captions import Captions
from diffmoe.data.manifest import Manifest
from diffmoe.errors import UserError
from diffmoe.prepare.resharding import rewrite
from diffmoe.prepare.sharding import Made
from diffmoe.text.encoders import TextEncoder
from diffmoe.work import Ranks


def encode_text(
    directory: str | Path,
    out: str | Path,
    encoder: TextEncoder,
    *,
    batch: int = 64,
    overwrite: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008 (a tuple)
) -> Manifest | None:
    """Rewrite shards that carry `txt` with the features of their captions, in float16.

    Returns the new manifest, or None while other ranks still work. batch: captions at a time.
    """
    if batch < 1:
        raise UserError(f"--batch {batch} must be at least 1")
    # The same captions must give the same bytes after a kill.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False

    def with_features(samples: Iterator[Made]) -> Iterator[Made]:
        while some := list(islice(samples, batch)):
            lines = [line for sample in some for line in sample.captions.lines]
            found = iter(_features(encoder, lines, batch))
            for sample in some:
                own = sample.captions.lines
                yield sample._replace(captions=_joined(own, list(islice(found, len(own)))))

    return rewrite(
        directory,
        out,
        with_features,
        changes={"text": encoder.content.model_dump()},
        settings={"batch": None if encoder.content.encoder == BYTES else batch},
        overwrite=overwrite,
        ranks=ranks,
    )


def _features(encoder: TextEncoder, lines: list[str], batch: int) -> Iterator[Captions]:
    """Each caption with its features, as the only one of a sample."""
    for start in range(0, len(lines), batch):
        part = lines[start : start + batch]
        if encoder.content.encoder == BYTES:
            yield from (Captions([line]) for line in part)
            continue
        text = encoder.encode(part)
        for row, line in enumerate(part):
            tokens = text.tokens[row][text.mask_BL[row]].to(torch.float16).numpy()
            pooled = None if text.pooled is None else text.pooled[row, None].half().numpy()
            yield Captions([line], tokens, np.array([len(tokens)], np.int32), pooled)


def _joined(lines: list[str], parts: list[Captions]) -> Captions:
    columns = zip(*(part[1:] for part in parts), strict=True)
    return Captions(
        lines, *(None if column[0] is None else np.concatenate(column) for column in columns)
    )
