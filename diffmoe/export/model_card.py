"""The model card: README.md of an exported folder, from its metadata and its run's results."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.diffusion.settings import PREVIEW_STEPS
from diffmoe.errors import UserError
from diffmoe.export.for_diffusers import loading_lines
from diffmoe.export.metadata import Metadata
from diffmoe.export.tensors import Shapes
from diffmoe.files import read_lines
from diffmoe.models.moe import ROUTING_STATE
from diffmoe.redaction import printable, redact, without_folders

RESULTS = "results.jsonl"
_NO_LICENSE = "license: # fill in before you share this"
_FILL_IN = "fill this in before you share the model."
_PLACE = "PATH OF THIS FOLDER"
_FAMILIES = {
    "diffmoe": "DiffMoE",
    "expert_choice": "EC-DiT",
    "token_choice": "TC-DiT",
    "race": "Expert Race",
    "promoe": "ProMoE",
    "dsmoe": "DSMoE",
    "dense": "dense DiT",
}


def parameter_counts(shapes: Shapes, moe: MoEConfig) -> tuple[int, float]:
    """All parameters, and those active for an average token at training's capacity (Eq. 40)."""
    total = experts = 0
    for name, shape in shapes.items():
        count = 1
        for side in shape:
            count *= side
        if name.endswith(ROUTING_STATE):
            continue
        total += count
        experts += count if ".experts." in name else 0
    each = moe.top_k if moe.chosen_by_tokens else min(moe.capacity, moe.experts)
    return total, total - experts + experts * each / moe.experts


def family(moe: MoEConfig) -> str:
    """For example: DiffMoE, 16 experts in every second block."""
    name = _FAMILIES[moe.type]
    if moe.type == "dense":
        return name
    where = "every block" if moe.every_block else "every second block"
    return f"{name}, {moe.experts} experts in {where}"


NAMES_SHOWN = 10  # of the classes


def blocks(model: ModelConfig) -> str:
    """How many of which width, such as 28 blocks of width 1152."""
    told, head = f"{model.depth} blocks of width {model.width}", model.wide_head
    if head is not None:
        told += f" and a wide head of {head.depth} of width {head.width}"
    return told


def conditioning(model: ModelConfig, class_names: Sequence[str] | None = None) -> str:
    """What a model is conditioned on, in words."""
    if model.text is None:
        shown = list(class_names or ())[:NAMES_SHOWN]
        more = ", ..." if len(class_names or ()) > NAMES_SHOWN else ""
        return f"{model.num_classes} classes" + (f": {', '.join(shown)}{more}" if shown else "")
    return f"captions of up to {model.text.length} tokens, encoder {model.text.encoder}"


def model_card(
    metadata: Metadata,
    shapes: Shapes,
    capacities: list[str],
    run: Path | None,
    diffusers: bool = False,
) -> str:
    """The text of README.md.

    capacities: names of calibrated thresholds. run: the folder whose results.jsonl is shown.
    diffusers: whether diffusers opens the folder, too (for_diffusers.py).
    """
    model, latents = metadata.model, metadata.latents
    total, active = parameter_counts(shapes, metadata.moe)
    objective = {"flow": "flow matching", "ddpm": "DDPM, 1,000 steps"}[metadata.diffusion.objective]
    shape = "x".join(map(str, latents.shape))
    rows = [
        ("model", f"{family(metadata.moe)}; {blocks(model)}, "
                  f"{model.heads} heads, patch {model.patch_size}"),
        ("parameters", f"{total:,}, of which {active:,.0f} are active for an average token"),
        ("trained with", objective),
        ("data", f"{latents.source}; {conditioning(model, metadata.class_names)}"),
        ("latents", f"{shape}, autoencoder {latents.autoencoder}, scale {latents.scale}, "
                    f"shift {latents.shift}"),
        ("samples seen", f"{metadata.clock.samples:,}" if metadata.clock else "unknown"),
        ("weights", f"{metadata.weights}, {metadata.dtype}"),
        ("made from", _provenance(metadata)),
    ]  # fmt: skip
    if metadata.moe.type == "diffmoe":
        rows.append(("calibrated capacities", ", ".join(capacities) or "none"))
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows)
    capacity = ", capacity=1" if "1" in capacities else ""
    guidance = metadata.guidance
    wanted = f"labels={list((metadata.class_names or (0, 1))[:2])}"
    if model.text is not None:
        wanted = 'prompt="A CAPTION"'
    return f"""---
library_name: diffmoe
{_NO_LICENSE}
---
# {family(metadata.moe)}

| | |
|---|---|
{table}

License: {_FILL_IN}

```python
import diffmoe
pipeline = diffmoe.Pipeline("{_PLACE}")
images = pipeline({wanted}, seed=0, steps={PREVIEW_STEPS}, guidance={guidance:g}{capacity})
```

{_with_diffusers(metadata, wanted, guidance, capacity) if diffusers else _CONVERT}
`config.json` describes the network and its latents; `checksums.json` has the SHA-256 of each file.
The method is described in arXiv 2503.14487.
{_results(run)}"""


# What a folder without the files for diffusers says of it.
_CONVERT = """For diffusers: `python tools/convert_checkpoint.py THIS_FOLDER TO --to diffusers`.
"""


def _with_diffusers(metadata: Metadata, wanted: str, guidance: float, capacity: str) -> str:
    call = (
        f"{wanted.replace('labels', 'class_labels')}, seed=0, guidance_scale={guidance:g}{capacity}"
    )
    return f"""Or with diffusers alone: the same images up to rounding. That runs the code that lies
here (`pipeline.py`, `transformer/diffmoe_transformer.py`):

```python
{loading_lines(metadata, _PLACE, call)}
```
"""


def with_license(card: str, name: str, license: str | None, where: Path) -> str:
    """The card of a model that is shared as `name`. license: such as mit; None: the card has one.

    Raises UserError where there is none. where: the card, for the error.
    """
    if _NO_LICENSE in card:
        if license is None:
            raise UserError(
                f"{where} names no license; give one (--license apache-2.0), or fill it in there"
            )
        card = card.replace(_NO_LICENSE, f"license: {license}").replace(_FILL_IN, f"{license}.")
    here, there = f'Pipeline("{_PLACE}")', f'Pipeline.from_pretrained("{name}")'
    return card.replace(here, there).replace(_PLACE, name)


def _provenance(metadata: Metadata) -> str:
    made = metadata.provenance
    parts = [f"{made.kind} {made.name}"]
    if made.sha256:
        parts.append(f"SHA-256 {made.sha256[:16]}...")
    return "; ".join([*parts, *made.steps])


def _results(run: Path | None) -> str:
    """The metrics of the run's results.jsonl, a row per line; empty if there are none."""
    lines = _read_results(run) if run is not None else []
    if not lines:
        return ""
    rows = "\n".join(
        f"| {', '.join(f'{key}: {_short(value)}' for key, value in line.items())} |"
        for line in lines
    )
    return f"\n## Results\n\n| results.jsonl of the run |\n|---|\n{rows}\n"


def _read_results(run: Path) -> list[dict[str, Any]]:
    """The objects of results.jsonl, one per line. Raises UserError for other lines."""
    file = run / RESULTS
    if not file.exists():
        return []
    lines = []
    for number, text in enumerate(_lines(file), 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{file}, line {number}, is not JSON ({error}); fix or remove it"
            ) from None
        if not isinstance(line, dict):
            raise UserError(f"{file}, line {number}, is not an object; fix or remove it")
        lines.append(line)
    return lines


def _lines(file: Path) -> list[str]:
    try:
        return list(read_lines(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return _cell(redact(without_folders(str(value))))[:200]


def _cell(text: str) -> str:
    """For a Markdown table: on one line."""
    return printable(text.replace("|", "/"))
