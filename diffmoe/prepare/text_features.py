"""Add a text encoder's features to shards with captions."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from diffmoe.config import BYTES
from diffmoe.data.captions import Captions
from diffmoe.data.latents import Sample
from diffmoe.data.manifest import Manifest
from diffmoe.errors import UserError
from diffmoe.prepare.resharding import rewrite
from diffmoe.prepare.sharding import ShardOutput
from diffmoe.text.encoders import TextEncoder


def encode_text(
    directory: str | Path, output: ShardOutput, encoder: TextEncoder, *, batch: int = 64
) -> Manifest | None:
    """Rewrite shards that carry `txt` with their captions' features, in float16.

    Returns the new manifest, or None while other ranks are still working. batch: captions per pass
    of the encoder. Raises UserError.
    """
    if batch < 1:
        raise UserError(f"--batch {batch} must be at least 1")
    # A resumed command must give the same bytes for the same captions.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False

    def with_features(samples: Iterator[Sample]) -> Iterator[Sample]:
        while some := list(islice(samples, batch)):
            lines = [sample.captions.lines if sample.captions else [] for sample in some]
            encoded = _features(encoder, [line for own in lines for line in own], batch)
            for sample, own in zip(some, lines, strict=True):
                yield sample._replace(captions=_join(own, list(islice(encoded, len(own)))))

    return rewrite(
        directory,
        output,
        with_features,
        changes={"text": encoder.content.model_dump()},
        settings={"batch": None if encoder.content.encoder == BYTES else batch},
    )


def _features(encoder: TextEncoder, lines: list[str], batch: int) -> Iterator[Captions]:
    """Each caption with its features, as if it were the only one of a sample."""
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


def _join(lines: list[str], parts: list[Captions]) -> Captions:
    """The captions of a sample with their features, from each caption with its own."""
    columns = zip(*(part[1:] for part in parts), strict=True)
    return Captions(
        lines, *(None if column[0] is None else np.concatenate(column) for column in columns)
    )
