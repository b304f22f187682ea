"""The pages of the documentation, and the commands that they show."""

import re
import shlex
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The words of each command in the page's bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def quick_digits() -> None:
    """In a command's process: fewer canvases of digits, and a reader of them that learns less."""
    from diffmoe.digits import captioned_digits, digit_network

    pack = captioned_digits.pack_captioned_digits
    captioned_digits.pack_captioned_digits = partial(pack, images=800)
    digit_network.EPOCHS = 1
