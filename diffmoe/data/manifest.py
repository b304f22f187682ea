"""manifest.json: what the shards of a folder hold, stated explicitly, never guessed from shapes."""

import hashlib
import math
import os
import re
import shlex
from pathlib import Path
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from diffmoe.config import BYTES, AlignConfig, ModelConfig, TextConfig, show_size
from diffmoe.errors import UserError, describe_problem
from diffmoe.files import does_not_exist, read_json, replacing
from diffmoe.latent_spec import LatentSpec
from diffmoe.redaction import redact

FILE_NAME = "manifest.json"

# Of a run, by their names.
Settings = dict[str, int | str | list[int]]

_URL = re.compile(r"[a-z][a-z0-9+.-]+:")
# "pipe:..." is a command; gs:, hf:, scp: and all others may start one. These two do not.
_HTTP = re.compile(r"https?:")
# What may replace {} in a command: nothing that a shell or an option parser would interpret.
_SAFE_NAME = re.compile(r"(?!-)[\w./+=@%,-]+", re.ASCII)

CAPTION_BYTES = 256  # default length of captions that are read as bytes
_MAX_NUMBERS = 1 << 26  # of a latent; a member of a shard must hold them


class Shard(BaseModel):
    """One tar file: its name (a path relative to the manifest's folder, or an http URL), counts
    and checksum.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=4096)
    samples: int = Field(lt=1 << 40)
    bytes: int = Field(ge=0, le=1 << 40)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class TextContent(BaseModel):
    """How a sample's captions (its `txt` member, one per line) are given to a model.

    encoder: "bytes": as UTF-8 bytes, without further members; else the name of the encoder whose
        features the shards hold: `text.npy` (N, D) float16, the captions' features without
        padding, one caption after another; `text_lengths.npy` (captions,), the tokens of each; and
        `text_pooled.npy` (captions, D_pool) if there are pooled vectors.
    length: most tokens of a caption. width, pooled: D and D_pool; 0: none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoder: str = Field(min_length=1)
    length: int = Field(ge=1, le=1 << 20)
    width: int = Field(default=0, ge=0, le=1 << 20)
    pooled: int = Field(default=0, ge=0, le=1 << 20)

    @classmethod
    def of(cls, text: TextConfig) -> "TextContent":
        """What a model of this configuration expects."""
        width = 0 if text.encoder == BYTES else text.width
        return cls(encoder=text.encoder, length=text.length, width=width, pooled=text.pooled)

    def settings(self, now: "TextContent | None" = None) -> Settings:
        """A run's settings. A model that reads bytes still has its own width and depth.

        now: what it expects; of the same encoder's fields only those that differ.
        """
        mine = self.model_dump()
        if now is not None and now.encoder == self.encoder:
            differing = [name for name in mine if getattr(now, name) != mine[name]]
            return {f"model.text.{name}": mine[name] for name in differing}
        if self.encoder == BYTES:
            return {"model.text.encoder": BYTES, "model.text.length": self.length}
        return {"model.text": f"{{{', '.join(f'{name}: {mine[name]}' for name in mine)}}}"}

    def override(self) -> str:
        """`settings`, for train.py."""
        return as_words(self.settings())


class FeatureContent(BaseModel):
    """The features of each sample's image, a float16 map (Z,h,w) of a frozen encoder.

    Member `features.npy`, and `features_flip.npy` of the mirrored image where data has flips.

    encoder: its name, with the size that it sees as @SIZE. layer: which of its outputs. checksum:
        the first digits of its weights' SHA-256; None of a function. shape: (Z,h,w).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoder: str = Field(min_length=1)
    layer: str
    checksum: str | None
    shape: tuple[int, int, int]

    @field_validator("shape")
    @classmethod
    def _shape_is_possible(cls, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        if min(shape) < 1 or math.prod(shape) > _MAX_NUMBERS:
            raise ValueError(f"{shape} must be of positive numbers, {_MAX_NUMBERS:,} in all")
        return shape


class Manifest(BaseModel):
    """What every shard of a folder holds.

    content: `sample` files hold a latent (C,H,W); `mean_logvar` and `mean_std` files hold the
        moments (2C,H,W) of its posterior: the mean, then log-variance or standard deviation.
    scaled: whether scale and shift are already in the files. The model works on
        (z - shift) * scale; the reader applies this if `scaled` is false, and decoding undoes it
        in either case. Each is one number or one per channel.
    shape: (C,H,W) of the latent.
    flips: half of the samples are mirrored in training.
    mirrored: `stored`: each sample also holds the mirrored image's latent or moments;
        `on_reading`: the array itself is mirrored, which is possible for pixels only.
    dtype: of the numbers in the files. bfloat16 is stored as its bits in uint16, because npy has
        no name for it. A byte v of uint8 is the pixel v / 127.5 - 1. None: float16 or float32, as
        each file's header says.
    version: 2 if `on_reading` or uint8 is used, else 1.
    autoencoder: "identity" if the latents are pixels, else the id or folder of the autoencoder.
    pixel_range: the numbers that are black and white for the autoencoder.
    skipped: items that were left out when packing, each with the reason.
    location: where the shards are if not beside the manifest: a folder, or a URL with {} for the
        shard's name, such as "pipe:aws s3 cp s3://bucket/latents/{} -". An address that starts a
        program is read only if the command line allows it (data.allow_commands=true).
    text: of samples with captions, else None.
    features: of samples with an image encoder's features, else None.
    """

    model_config = ConfigDict(extra="forbid")

    version: Literal[1, 2] = 1
    shards: list[Shard]
    content: Literal["sample", "mean_logvar", "mean_std"]
    scaled: bool
    scale: float | list[float] = 1.0
    shift: float | list[float] = 0.0
    shape: tuple[int, int, int]
    flips: bool
    mirrored: Literal["stored", "on_reading"] = "stored"
    classes: int = Field(ge=1, le=10_000_000)
    class_names: list[str] | None = None
    autoencoder: str
    source: str
    dtype: Literal["uint8", "float16", "bfloat16", "float32"] | None = None
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    skipped: list[str] = []
    location: str | None = None
    text: TextContent | None = None
    features: FeatureContent | None = None

    @field_validator("shape")
    @classmethod
    def _shape_is_positive(cls, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        if min(shape) < 1:
            raise ValueError("every side must be at least 1")
        if math.prod(shape) > _MAX_NUMBERS:
            raise ValueError(f"it has {math.prod(shape):,} numbers; the limit is {_MAX_NUMBERS:,}")
        return shape

    @model_validator(mode="after")
    def _lengths_agree(self) -> "Manifest":
        for name in ("scale", "shift"):
            value = getattr(self, name)
            numbers = value if isinstance(value, list) else [value] * self.shape[0]
            if len(numbers) != self.shape[0]:
                raise ValueError(f"{name} has {len(numbers)} numbers for {self.shape[0]} channels")
            if not all(math.isfinite(number) for number in numbers):
                raise ValueError(f"{name}={value} is not finite")
            if name == "scale" and 0 in numbers:
                raise ValueError("scale contains a zero, which would erase the latents")
        if self.class_names is not None and len(self.class_names) != self.classes:
            raise ValueError(
                f"class_names has {len(self.class_names)} names, classes is {self.classes}"
            )
        names = [shard.name for shard in self.shards]
        if len(set(names)) != len(names):
            raise ValueError("shards lists a file twice")
        if not self.pixel_range[0] < self.pixel_range[1]:
            raise ValueError(f"pixel_range={self.pixel_range} must be black < white")
        if self.location is not None and _URL.match(self.location) and "{}" not in self.location:
            raise ValueError(
                f"location={redact(self.location)!r} needs {{}} where the shard's name goes"
            )
        if self.dtype == "uint8" or self.mirrored == "on_reading":
            self.version = 2
            if self.autoencoder != "identity" or self.content != "sample":
                raise ValueError(
                    f"dtype={self.dtype} with mirrored={self.mirrored}: uint8 and on_reading are "
                    f"for pixels only, not for {self.content} of {self.autoencoder}"
                )
        return self

    @model_serializer(mode="wrap")
    def _fields_of_version(self, dump: SerializerFunctionWrapHandler) -> dict:
        fields = dump(self)
        if self.version == 1:
            fields.pop("mirrored", None)
        if self.features is None:
            fields.pop("features", None)
        return fields

    @property
    def latent_spec(self) -> LatentSpec:
        """What the numbers of these latents are."""
        return LatentSpec.from_manifest(self.model_dump(), FILE_NAME)

    @property
    def samples(self) -> int:
        """Samples of all shards together."""
        return sum(shard.samples for shard in self.shards)

    @property
    def shards_sha256(self) -> str:
        """Stands for the data: every shard's count and checksum, in order, wherever they lie."""
        shards = [(shard.samples, shard.sha256) for shard in self.shards]
        return hashlib.sha256(repr(shards).encode()).hexdigest()

    def summary(self, directory: str | Path) -> str:
        """One line for the end of a packing command."""
        size = sum(shard.bytes for shard in self.shards) / 1e6
        kind = f"of {self.classes} classes" if self.text is None else "with captions"
        shards = f"{len(self.shards)} shards, {size:.1f} MB"
        text = f"{directory}: {self.samples} samples {kind} in {shards}"
        if self.skipped:
            text += f"; {len(self.skipped)} skipped, see skipped in {FILE_NAME}"
        return text

    @property
    def member(self) -> str:
        """The npy member that each sample has: `latent` or `moments`."""
        return "latent" if self.content == "sample" else "moments"

    @property
    def stores_flips(self) -> bool:
        """Whether each sample also holds the mirrored image's array."""
        return self.flips and self.mirrored == "stored"

    @property
    def feature_members(self) -> list[str]:
        """The npy members of an image encoder's features: of the image, and of its mirror image."""
        if self.features is None:
            return []
        return ["features.npy", "features_flip.npy"][: 1 + self.flips]

    @property
    def array_shape(self) -> tuple[int, int, int]:
        """Shape of the array in the files: (C,H,W), or (2C,H,W) for moments."""
        channels, height, width = self.shape
        return (channels if self.content == "sample" else 2 * channels, height, width)

    def address(self, directory: str | Path, shard: Shard) -> str:
        """The path or URL of a shard; paths are absolute, `file:` URLs become paths.

        Raises UserError for a name that is a command or would become part of one unescaped.
        """
        place = shard.name
        in_command = self.location is not None and starts_program(self.location)
        if starts_program(place) or (in_command and not _SAFE_NAME.fullmatch(place)):
            raise UserError(
                f"{Path(directory) / FILE_NAME}: the shard name {place!r} would run as a command; "
                "shard names must be plain; only location may start a program"
            )
        if self.location is not None and not _URL.match(place):
            place = (
                self.location.replace("{}", place)
                if "{}" in self.location
                else os.path.join(self.location, place)
            )
        if place.startswith("file:"):
            place = re.sub("^file:(//)?", "", place)
        elif _URL.match(place):
            return place
        return os.path.abspath(os.path.join(directory, place))

    @classmethod
    def load(cls, directory: str | Path, setting: str = "data.path") -> "Manifest":
        """Read `directory`/manifest.json. Raises UserError if it is missing or invalid.

        setting: that names the directory.
        """
        file = Path(directory) / FILE_NAME
        if not Path(directory).is_dir():
            raise UserError(
                f"data folder {does_not_exist(directory)}; set {setting} to a folder of shards, or "
                "make one, for example: python tools/prepare_data.py mnist --out data/mnist"
            )
        if not file.exists():
            raise UserError(
                f"{file} is missing: {directory} is not a data folder, or packing it did not "
                "finish; pack the data again (tools/prepare_data.py --help)"
            )
        try:
            return cls.model_validate(read_json(file))
        except ValidationError as error:
            problems = "; ".join(describe_problem(problem) for problem in error.errors())
            raise UserError(f"{file}: {problems}. Fix these or pack the data again") from None

    def save(self, directory: str | Path) -> None:
        """Write `directory`/manifest.json atomically."""
        # Several ranks may finish packing together; each writes the same contents.
        with replacing(Path(directory) / FILE_NAME) as stream:
            stream.write(self.model_dump_json(indent=1).encode() + b"\n")

    def check(
        self, directory: str | Path, lanes: int | None = None, max_bad_shards: int = 0
    ) -> None:
        """Compare the manifest with the files: only their sizes, and URLs not at all.

        max_bad_shards: how many files may be missing or of another size. Raises UserError.
        """
        file = Path(directory) / FILE_NAME
        if not self.shards:
            raise UserError(f"{file}: shards is empty; pack the data again")
        bad = []
        for shard in self.shards:
            if shard.samples < 1:
                raise UserError(
                    f"{file}: shard {shard.name} has samples={shard.samples}; it must hold at "
                    "least one: remove it from the manifest or pack the data again"
                )
            address = self.address(directory, shard)
            problem = None if is_url(address) else _problem(Path(address), shard)
            if problem is not None:
                bad.append(problem)
            if len(bad) > max_bad_shards:
                raise UserError(bad[-1])
        if lanes is not None:
            self.check_lanes(lanes)

    def check_lanes(self, lanes: int) -> None:
        """Raise UserError if there are fewer shards than lanes."""
        if lanes < 1 or lanes > len(self.shards):
            raise UserError(
                f"data.lanes={lanes} does not fit the {len(self.shards)} shards of the data; set "
                f"data.lanes to 1..{len(self.shards)}, or pack the data into at least "
                f"{max(lanes, 1)} shards"
            )

    def settings_to_change(self, model: ModelConfig, lanes: int | None = None) -> Settings:
        """The settings in which a run does not fit the data, with values that do.

        Shape, classes or captions, and, if given, lanes: a divisor of those, so that a batch that
        they divide is divided still.
        """
        (channels, height, width), now = self.shape, model.latent_shape
        wanted: Settings = {}
        if channels != now[0]:
            wanted["model.in_channels"] = channels
        if (height, width) != now[1:]:
            wanted["model.input_size"] = height if height == width else [height, width]
        if model.text is None and model.num_classes != self.classes:
            wanted["model.num_classes"] = self.classes
        side = math.gcd(height, width)
        if side % model.patch_size:
            patches = range(model.patch_size, 0, -1)
            wanted["model.patch_size"] = next(patch for patch in patches if side % patch == 0)
        if model.text is not None and self.text is not None:
            wanted |= self.text.settings(TextContent.of(model.text))
        if lanes is not None and lanes > len(self.shards) > 0:
            fewer = range(len(self.shards), 0, -1)
            wanted["data.lanes"] = next(count for count in fewer if lanes % count == 0)
        return wanted

    def check_model(self, model: ModelConfig, lanes: int | None = None) -> None:
        """Raise UserError unless in_channels, input_size, and num_classes or text fit the model.

        lanes: of the run; its message names them, too, if there are fewer shards.
        """
        own_channels, height, width = self.shape
        shape = "x".join(map(str, self.shape))
        settings = as_words(self.settings_to_change(model, lanes))
        if model.in_channels != own_channels:
            raise UserError(
                f"{FILE_NAME} of the data: shape={shape} has {own_channels} channels, but "
                f"model.in_channels={model.in_channels}; set {settings}, or "
                "data.path to other data"
            )
        if (height, width) != model.latent_shape[1:]:
            raise UserError(
                f"{FILE_NAME} of the data: shape={shape} is {height} high and {width} wide, but "
                f"model.input_size={show_size(model.input_size)}; set {settings}, or set data.path "
                "to other data"
            )
        if model.text is not None:
            self._check_text(model.text, settings)
        elif model.num_classes != self.classes:
            raise UserError(
                f"{FILE_NAME} of the data: classes={self.classes}, but model.num_classes="
                f"{model.num_classes}; set {settings}, or data.path to other "
                "data"
            )

    def check_align(self, align: AlignConfig) -> None:
        """Raise UserError where alignment is wanted and the shards hold no such features."""
        if align.block is None:
            return
        if self.features is None:
            raise UserError(
                f"{FILE_NAME} of the data: there are no features, but align.block={align.block} "
                "aligns with them; add them (python tools/encode_features.py --help), or set "
                "align.block=null"
            )
        channels = self.features.shape[0]
        if channels != align.width:
            raise UserError(
                f"{FILE_NAME} of the data: features of {self.features.encoder} have {channels} "
                f"channels, but align.width={align.width}; set align.width={channels}, or "
                "data.path to other data"
            )

    def _check_text(self, model: TextConfig, settings: str) -> None:
        if self.text is None:
            raise UserError(
                f"{FILE_NAME} of the data: there is no text, but model.text is set; set data.path "
                "to data with captions, or model.text=null to train on classes"
            )
        expected = TextContent.of(model)
        for field in TextContent.model_fields:
            of_data, of_model = getattr(self.text, field), getattr(expected, field)
            if of_data != of_model:
                raise UserError(
                    f"{FILE_NAME} of the data: text.{field}={of_data}, but model.text.{field}="
                    f"{of_model}; set {settings}, or data.path to other data"
                )


def as_words(settings: Settings) -> str:
    """As they are written after a command."""
    return " ".join(shlex.quote(f"{key}={value}") for key, value in settings.items())


def _problem(path: Path, shard: Shard) -> str | None:
    """What is wrong with a file, as far as can be seen without reading it."""
    if not path.is_file():
        return (
            f"shard {path} is missing, but {FILE_NAME} lists it; copy it there or pack the data "
            "again"
        )
    size = path.stat().st_size
    if size == 0:
        return f"shard {path} is empty (0 bytes); copy it or pack the data again"
    if size != shard.bytes:
        kind = "truncated" if size < shard.bytes else "longer than it was packed"
        return (
            f"shard {path} is {kind}: {size} bytes on disk, {shard.bytes} in {FILE_NAME}; "
            "copy it again or pack the data again"
        )
    return None


def is_url(address: str) -> bool:
    """Whether a shard's address is a URL, not a path."""
    return _URL.match(address) is not None


def starts_program(address: str) -> bool:
    """Whether reading a shard from there may start a program on this machine."""
    return is_url(address) and not address.startswith("file:") and not _HTTP.match(address)
