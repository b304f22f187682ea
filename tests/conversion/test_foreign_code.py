"""Code in a file is refused, and is not run."""

import pickle
from pathlib import Path

import pytest
import torch

from diffmoe.conversion.detect_format import open_source
from diffmoe.conversion.foreign import Options
from diffmoe.errors import UserError


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("form", ["pickle", "torch", "torch in a state dict"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, form):
    mark, file = tmp_path / "was run", tmp_path / "evil.pt"
    payload = Payload(mark)
    if form == "pickle":
        file.write_bytes(pickle.dumps({"ema": payload}))
    elif form == "torch":
        torch.save(payload, file)
    else:
        torch.save({"ema": {"weight": torch.zeros(2), "extra": payload}}, file)
    with (
        pytest.raises(UserError, match=r"evil\.pt is refused"),
        open_source(file, options=Options(objective="flow", heads=2)),
    ):
        pytest.fail("it was opened")
    assert not mark.exists()
