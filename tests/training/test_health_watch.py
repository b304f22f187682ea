"""Warnings on routing: once, and of what lasts."""

from pathlib import Path

import pytest

from diffmoe.training.health_watch import PATIENCE, HealthWatch
from tests.helpers.runs import metrics, pack, run_config, train

SOUND = {
    "gate_sum": [0.21, 1.1],  # the least of the study's mixtures, which beat dense
    "time_share": [0.1, 0.2],
    "unselected_share": [0.3, 0.4],
    "dead_experts": [0, 0],
    "load_entropy": [0.95, 0.99],
    "expert_output_similarity": [0.1, 0.0],
}
TROUBLED = {
    "gate_sum": (0.06, "sum to 0.06"),
    "time_share": (0.7, "explains 70%"),
    "unselected_share": (0.8, "no expert takes 80%"),
    "dead_experts": (3, "3 of the experts"),
    "load_entropy": (0.2, "entropy 0.20"),
    "expert_output_similarity": (0.97, "cosine 0.97"),
}


def test_what_is_sound_is_not_mentioned():
    watch = HealthWatch()
    assert [watch.warnings(SOUND) for _ in range(10)] == [[]] * 10
    assert watch.warnings({}) == []


@pytest.mark.parametrize("metric", TROUBLED)
def test_trouble_that_lasts_is_said_once(metric: str):
    value, words = TROUBLED[metric]
    watch, bad = HealthWatch(), {**SOUND, metric: [SOUND[metric][0], value]}
    said = [watch.warnings(bad) for _ in range(PATIENCE + 5)]
    (message,) = said[PATIENCE - 1]
    assert message.startswith(f"warning: MoE layer 1 of 2 (from 0), {metric}: ")
    assert words in message
    assert sum(map(len, said)) == 1


def test_trouble_that_comes_back_is_not_said_again():
    watch, bad = HealthWatch(), {**SOUND, "gate_sum": [0.01, 0.01]}
    said = [watch.warnings(line) for line in ([bad] * PATIENCE + [SOUND]) * 3]
    assert sum(map(len, said)) == 1


def test_trouble_that_passes_is_not_mentioned():
    watch, bad = HealthWatch(), {**SOUND, "gate_sum": [0.01, 0.01]}
    lines = ([bad] * (PATIENCE - 1) + [SOUND]) * 3
    assert not any(watch.warnings(line) for line in lines)


class Noting:
    """Writes what a run says into a file as well."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, rank: int) -> None:
        from diffmoe.training.telemetry import Telemetry

        say = Telemetry.say

        def noting(telemetry: Telemetry, message: str) -> None:
            if telemetry.active:
                with open(self.file, "a") as file:
                    file.write(f"{message}\n")
            say(telemetry, message)

        Telemetry.say = noting


@pytest.mark.slow
def test_a_run_warns_of_softmax_gates_and_not_of_larger_ones(tmp_path: Path):
    pack(tmp_path / "data")
    few = run_config(tmp_path, 4, moe__experts=16, parallel__expert_parallel=2)
    said = tmp_path / "said"
    train(few, 2, prepare=Noting(said))
    assert said.read_text().count("warning: MoE layer 0, 1 of 2 (from 0), gate_sum") == 1
    assert metrics(few)[-1]["gate_sum"][0] < 0.1
    scaled = few.replace({"moe.gate_scale": "experts", "output": str(tmp_path / "scaled")})
    said.unlink()
    train(scaled, 2, prepare=Noting(said))
    assert "gate_sum" not in said.read_text()
    line = metrics(scaled)[-1]
    for name in ("time_share", "expert_weight_similarity", "load_entropy", "dead_experts"):
        assert len(line[name]) == 2
    assert all(abs(value) < 0.2 for value in line["expert_weight_similarity"])
