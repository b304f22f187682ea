"""The report: one self-contained HTML page on what the experts of a model do."""

import base64
import html
from collections.abc import Callable, Sequence
from pathlib import Path

from diffmoe.capacity.health import TROUBLES
from diffmoe.routing_report import figures
from diffmoe.routing_report.analysis import PredictorAccuracy, SamplingRouting

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
img{max-width:100%}table{border-collapse:collapse}td,th{padding:.1rem .8rem;text-align:right}
.alarm{background:#fde8e6;border-left:4px solid #c0392b;padding:.5rem 1rem}
.fine{background:#e8f6ec;border-left:4px solid #27ae60;padding:.5rem 1rem}"""


def write_page(
    file: Path,
    title: str,
    facts: dict[str, str],
    routing: SamplingRouting,
    accuracy: PredictorAccuracy | None,
    captions: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write the page.

    facts: rows of the table on the model and the sampling, by name.
    accuracy: None leaves out the part on the predictor (no data available, or no predictor).
    captions: of a text model, by number; they take the place of classes. class_names: by number.
    """
    sections = [
        (
            "Capacity by time",
            "How many experts work on an average token, from noise to data (Fig. 1c of the paper).",
            figures.capacity_by_time(routing),
        ),
        (
            "By layer and expert",
            "The same for each expert (Fig. 12).",
            figures.capacity_by_expert(routing),
        ),
        *_classes(routing, captions, class_names),
        (
            "Where each expert works",
            "The share of samples and times in which the expert takes the token at this place.",
            figures.places(routing),
        ),
        (
            "Tokens that no expert takes",
            "They pass the layer through the residual connection alone.",
            figures.unselected(routing),
        ),
        (
            "Overlap between experts",
            "Two experts that take the same tokens may have learned the same function.",
            figures.overlap(routing),
        ),
    ]
    if accuracy is not None:
        sections += [
            (
                "The capacity predictor: precision and recall",
                "Compared with the selection of training, on real data at its noise levels. "
                "Precision: of the token-expert pairs above the threshold, the share that training "
                "would select; recall: of those, the share above the threshold.",
                figures.precision_and_recall(accuracy),
            ),
            (
                "The capacity predictor: calibration",
                "On the dotted line the predicted probability equals the selected share.",
                figures.calibration_curve(accuracy),
            ),
        ]
    rows = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>"
        for key, value in facts.items()
    )
    body = "".join(
        f"<h2>{heading}</h2><p>{text}</p><img alt='{heading}' src='data:image/png;base64,"
        f"{base64.b64encode(figures.png(figure)).decode()}'>"
        for heading, text, figure in sections
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{_verdict(routing)}"
        f"<table>{rows}</table>{_health(routing)}{body}</html>",
        encoding="utf-8",
    )


# Numbers of health, by what a reader is told.
_HEALTH = {
    "branch_size": "size of what experts add (root mean square)",
    "branch_size_over_dense": "that over the dense blocks'",
    "time_share": "share of the selection that time alone explains",
    "unselected_share": "tokens that no expert takes",
    "load_entropy": "entropy of the load over an even one's",
    "dead_experts": "dead experts",
    "expert_weight_similarity": "cosine between experts' first matrices",
    "expert_output_similarity": "cosine between experts' outputs for the same tokens",
}


def _health(routing: SamplingRouting) -> str:
    """A table of the numbers by MoE layer, and what of it is known to mean trouble."""
    there = {name: words for name, words in _HEALTH.items() if name in routing.health}
    layers = range(len(routing.health["time_share"]))
    head = "".join(f"<th>layer {layer}</th>" for layer in layers)
    rows = "".join(
        f"<tr><th>{html.escape(words)}</th>"
        + "".join(f"<td>{value:.3g}</td>" for value in routing.health[name])
        + "</tr>"
        for name, words in there.items()
    )
    alarms = "".join(
        f"<p class='alarm'>{html.escape(message)}</p>"
        for trouble in TROUBLES
        if trouble.metric != "dead_experts"  # which the verdict names
        for message in [trouble.told(routing.health.get(trouble.metric, []))]
        if message is not None
    )
    return f"<h2>Health</h2>{alarms}<table><tr><th></th>{head}</tr>{rows}</table>"


def _classes(
    routing: SamplingRouting, captions: Sequence[str] | None, class_names: Sequence[str] | None
) -> list[tuple]:
    """One section for up to ten classes or captions, else the ten with most and with least C."""
    means = list(routing.by_class().items())
    kind = "classes" if captions is None else "captions"
    text = "Two samples of each; below each sample the number of experts at work on each token"

    def section(heading: str, text: str, chosen: list[tuple[int, float]]) -> tuple:
        name: Callable[[int], str] = str
        names = captions or class_names
        if names:
            name = names.__getitem__
            rows = (f"<li>C {mean:.2f}: {html.escape(name(label))}</li>" for label, mean in chosen)
            text += f"</p><ul>{''.join(rows)}</ul><p>"
        return heading, text, figures.classes(routing, chosen, name)

    if len(means) <= 10:
        return [section(f"{kind.title()}, those that take most compute first", f"{text}.", means)]
    return [
        section(
            f"The hardest {kind}",
            f"Those that take most compute. {text} (Fig. 13).",
            means[:10],
        ),
        section(f"The easiest {kind}", "Those that take least (Fig. 14).", means[:-11:-1]),
    ]


def _verdict(routing: SamplingRouting) -> str:
    """A paragraph on dead experts."""
    dead = routing.dead_experts()
    L, E = routing.capacity.by_layer_and_expert.shape
    if not dead:
        return f"<p class='fine'>None of the {L * E} experts is dead: all of them take tokens.</p>"
    names = "; ".join(f"layer {layer}, expert {expert}" for layer, expert in dead)
    return (
        f"<p class='alarm'>{len(dead)} of {L * E} experts are dead: at inference they take less "
        f"than 1 % of the tokens that an average expert takes. They are: {names}. Their weights "
        "serve no purpose; calibrating the thresholds (tools/calibrate.py) gives every expert an "
        "equal share.</p>"
    )
