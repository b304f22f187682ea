"""A model that was trained without label dropout: every tool samples it unguided and says so."""

from pathlib import Path

import pytest

from tests.helpers.models import exported
from tests.helpers.tools import command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("unguided") / "model", label_dropout=0.0)


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ("sample", ["--classes", "0", "--per-class", "1", "--out", "OUT/grid.png"]),
        ("sample", ["--num-samples", "2", "--out", "OUT"]),
        ("calibrate", ["--capacity", "0.5", "--samples", "4"]),
        ("report_routing", ["--samples", "2", "--out", "OUT/page.html"]),
    ],
)
def test_without_a_scale_it_is_1_and_another_is_refused(
    tool: str, words: list[str], model: Path, tmp_path: Path
):
    words = [word.replace("OUT", str(tmp_path)) for word in words]
    words = [f"tools/{tool}.py", str(model), *words, "--steps", "2"]
    refused = command(*words, "--guidance", "2")
    assert refused.returncode == 2
    assert "guidance 2: the model was trained with training.label_dropout=0" in refused.stderr
    done = command(*words)
    assert done.returncode == 0, done.stderr
    said = "guidance 1: the model was trained without label dropout, so it cannot be guided"
    assert said in done.stderr
