"""Exported models on the Hugging Face hub: fetched by their id, published from their folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from diffmoe.errors import UserError
from diffmoe.export.adapters import is_adapters
from diffmoe.export.exported_model import CARD, CHECKSUMS, ExportedModel, is_exported
from diffmoe.export.for_diffusers import CODE
from diffmoe.export.model_card import with_license
from diffmoe.files import read_json, read_text

# All that an exported folder holds (exported_model.py); anything else in a repository stays there.
# The code for diffusers is fetched to be compared with its checksums; nothing here runs it.
_FILES = ("*.json", "*.safetensors", CARD, "vae/*", *CODE)


class Publication(NamedTuple):
    """What is uploaded: sizes of the files by name, and the card, with license and name in it."""

    files: dict[str, int]
    card: str


def fetch(name: str, revision: str | None = None) -> Path:
    """The local folder of a model `OWNER/NAME` of the hub, downloaded where the cache lacks it.

    Files lie in huggingface_hub's cache and are taken from there without a network. revision: a
    branch, tag or commit. Raises UserError where there is no such model, or no way to it.
    """
    with _hub_errors(f"the model {name}"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))


def prepare(folder: Path, name: str, license: str | None = None) -> Publication:
    """Look at what `publish` would upload. Raises UserError where the model is incomplete or
    damaged, or has no license.
    """
    if is_adapters(folder):
        raise UserError(
            f"{folder} holds adapters, and the hub gets whole models: merge them, python "
            "tools/convert_checkpoint.py RUN TO, where RUN is the run that trained them"
        )
    if not is_exported(folder):
        raise UserError(
            f"{folder} is not an exported model; make one: python tools/convert_checkpoint.py "
            f"{folder} TO"
        )
    ExportedModel(folder).verify()
    listed = [*read_json(folder / CHECKSUMS)["files"], CHECKSUMS, "thresholds.json"]
    files = {one: (folder / one).stat().st_size for one in listed if (folder / one).exists()}
    card = with_license(read_text(folder / CARD), name, license, folder / CARD)
    return Publication(files | {CARD: len(card.encode())}, card)


def publish(folder: Path, name: str, license: str | None = None, private: bool = False) -> str:
    """Create the repository `OWNER/NAME`, if need be, and upload the folder in one commit.

    Returns its address. Uses the token of `hf auth login` or HF_TOKEN. Raises UserError as
    `prepare` does, and where the hub refuses.
    """
    made = prepare(folder, name, license)
    with _hub_errors(name):
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        contents = {file: str(folder / file) for file in made.files} | {CARD: made.card.encode()}
        commit = api.create_commit(
            name,
            [CommitOperationAdd(file, content) for file, content in contents.items()],
            commit_message="Upload a model of DiffMoE",
        )
    return str(commit.commit_url)


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Errors of the hub and of the way to it, as UserError."""
    try:
        yield
    except ImportError:
        raise UserError(
            "models of the hub need huggingface_hub, which is not installed; run: pip install "
            '"diffmoe[hub]"'
        ) from None
    except UserError:
        raise
    except Exception as error:  # the client's own, its HTTP library's, the system's
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{what}: the hub gave an error ({reason[0] if reason else type(error).__name__}); "
            "check the name, the network, and the token (hf auth login, or HF_TOKEN)"
        ) from None
