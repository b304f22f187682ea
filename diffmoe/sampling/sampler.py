"""A model opened for sampling: latents, images and folders of images from one object."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmoe.capacity.forward import Forward, Observer
from diffmoe.capacity.meter import CapacityByTime, CapacityMeter
from diffmoe.capacity.thresholds import CapacityChoice, choose_capacity, hash_of
from diffmoe.clock import Clock
from diffmoe.config import Config
from diffmoe.data.autoencoders import Autoencoder, NoDecoder, autoencoder_of
from diffmoe.diffusion.samplers import Progress
from diffmoe.diffusion.settings import GUIDANCE, SamplingSettings
from diffmoe.errors import UserError
from diffmoe.export.open import locate, open_network, weights_of
from diffmoe.export.tensors import parameter_dtype
from diffmoe.files import read_bytes, sha256_of
from diffmoe.latent_spec import LatentSpec
from diffmoe.models.dit import DiT
from diffmoe.models.precision import dtype_name
from diffmoe.models.routing_mode import Kind
from diffmoe.parallel.topology import Topology
from diffmoe.sampling.images import SampledImages
from diffmoe.sampling.latents import can_guide, check_sampling, sample_latents
from diffmoe.sampling.many_images import (
    LATENTS,
    SampleRequest,
    SampleResult,
    fill_folder,
    shard_size_of,
)
from diffmoe.text.prompts import Prompts
from diffmoe.work import Ranks

# Called with the size of each batch, gives an observer of its evaluations.
Watch = Callable[[int], Observer]


class Origin(NamedTuple):
    """Where a sampler was opened.

    path: of the checkpoint or exported model. weights: ema or live. latents: what the network's
    numbers stand for. class_names: empty if unknown. clock: how far the training was. adapters: the
    folder of those that were merged.
    """

    path: Path
    weights: str
    latents: LatentSpec
    class_names: tuple[str, ...]
    clock: Clock
    adapters: Path | None = None

    @property
    def calibrated_in(self) -> Path:
        """The folder of calibrated thresholds."""
        return self.adapters or self.path

    @property
    def title(self) -> str:
        """What results and pages call it."""
        return str(self.path) + (f" with {self.adapters}" if self.adapters else "")


@dataclass(frozen=True, eq=False)
class Sampler:
    """A network with all that sampling from it needs. A value: `with_capacity` gives another one.

    autoencoder: None where latents alone are asked for. prompts: what a text model draws.
    choice: how the network routes while it samples. origin: None of a live network. decoder: the
    user's, in place of the autoencoder that the latents name.

    Sampling raises UserError where settings, labels or prompts do not fit the network, before any
    work, and for latents that are not finite. Image k of a seed has noise of its own: with
    per-token routing it does not depend on its batch, the order or the number of ranks.
    """

    network: DiT
    config: Config
    autoencoder: Autoencoder | None = None
    prompts: Prompts | None = None
    choice: CapacityChoice = field(default_factory=CapacityChoice)
    origin: Origin | None = None
    decoder: str | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        weights: str = "ema",
        *,
        topology: Topology | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str = torch.float32,
        verify: bool = True,
        with_autoencoder: bool = True,
        adapters: str | Path | None = None,
    ) -> "Sampler":
        """path: a run's folder (its newest checkpoint), a checkpoint or an exported model.

        weights, topology, device, verify, adapters: as of export.open.open_network, and dtype, too,
        but in bf16 only the network's products are computed (DiT.compute_in).
        """
        path, dtype = locate(path), parameter_dtype(dtype)
        apart = None if adapters is None else Path(adapters)
        in_bf16 = dtype == torch.bfloat16
        stored = torch.float32 if in_bf16 else dtype
        opened = open_network(path, weights, topology, device, stored, verify, apart)
        weights = weights_of(path, weights, apart)
        if in_bf16:
            opened.network.compute_in(dtype)
        return cls(
            opened.network,
            opened.config,
            autoencoder_of(opened.latents, device) if with_autoencoder else None,
            origin=Origin(path, weights, opened.latents, opened.class_names, opened.clock, apart),
        )

    @property
    def model(self) -> Origin:
        """Where it was opened. Raises ValueError for a live network."""
        if self.origin is None:
            raise ValueError("this sampler has a live network, which was not opened from a path")
        return self.origin

    @property
    def dtype(self) -> str:
        """What the network computes in: fp32, bf16, or torch's name of another type."""
        return dtype_name(self.network.autocast or next(self.network.parameters()).dtype)

    @property
    def choices(self) -> int:
        """How many classes there are to draw, or captions of a text model."""
        return self.config.model.num_classes if self.prompts is None else len(self.prompts)

    def with_capacity(self, capacity: float | None, routing: Kind | None = None) -> "Sampler":
        """The same model at another capacity and kind of routing (capacity.thresholds)."""
        folder, weights = self.model.calibrated_in, self.model.weights
        choice = choose_capacity(self.network, folder, routing, capacity, weights)
        return replace(self, choice=choice)

    def with_decoder(self, decoder: str | None) -> "Sampler":
        """The same model, with the user's decoder in place of its autoencoder.

        decoder: as of data.autoencoders.autoencoder_of; code that it names is run. None: no change.
        """
        if decoder is None:
            return self
        device = self.network.positions.device
        autoencoder = autoencoder_of(self.model.latents, device, decoder)
        return replace(self, autoencoder=autoencoder, decoder=decoder)

    def without_decoder(self) -> "Sampler":
        """The same model; its "images" are latents, as its autoencoder's decoder takes them."""
        latents = self.model.latents
        return replace(self, autoencoder=NoDecoder(latents.scale, latents.shift))

    def routed(self) -> AbstractContextManager[None]:
        """While it lasts, the network routes as this sampler's images are made."""
        mode = self.choice.mode
        return nullcontext() if mode is None else self.network.routed(mode)

    def identity(self) -> dict[str, Any]:
        """What determines the images beside request and settings, for samples.json.

        sha256: of the model's checksums.json, which holds those of all its files. routing: None
        where the model has no choice. decoder: if the user named one; of a file its SHA-256, too.
        adapters: if there are any, with the SHA-256 of their checksums.json.
        """
        path, weights = self.model.path, self.model.weights
        named = {}
        if self.decoder is not None:
            named = {"decoder": self.decoder}
            if os.path.isfile(self.decoder):
                named["decoder_sha256"] = sha256_of(Path(self.decoder))
        adapters = self.model.adapters
        if adapters is not None:
            named |= {
                "adapters": adapters.name,
                "adapters_sha256": sha256_of(adapters / "checksums.json"),
            }
        with self.routed():
            return named | {
                "checkpoint": path.name,
                "sha256": hashlib.sha256(read_bytes(path / "checksums.json")).hexdigest(),
                "weights": weights,
                "routing": self.network.routing and self.network.routing.kind,
                "capacity": self.choice.capacity,
                "thresholds_sha256": hash_of(self.network),
            }

    def request(
        self, number: int, labels: str = "balanced", classes: Sequence[int] | None = None
    ) -> SampleRequest:
        """For `folder`. classes: None takes all, of a text model all captions."""
        return SampleRequest(number, tuple(classes or range(self.choices)), labels)

    def fitted(
        self, settings: SamplingSettings, say: Callable[[str], None] = lambda text: None
    ) -> SamplingSettings:
        """With guidance where none was chosen: the default, or 1 where the model cannot be guided.

        And with the shift of its training where none was chosen. say: is called with a note on a
        model that cannot be guided.
        """
        settings = settings.with_shift_of(self.config)
        if settings.guidance is not None:
            return settings
        if can_guide(self.config, self.prompts):
            return replace(settings, guidance=GUIDANCE)
        how = "it cannot be guided" if self.prompts is None else "only a negative prompt guides it"
        say(f"guidance 1: the model was trained without label dropout, so {how}")
        return replace(settings, guidance=1.0)

    def calibration_note(
        self, settings: SamplingSettings, met: CapacityByTime | None
    ) -> str | None:
        """A note where samples were made with other settings than the thresholds in use."""
        if self.choice.calibrated is None or met is None:
            return None
        return self.choice.calibrated.differs(settings, self.config, met.average)

    def latents(
        self,
        labels: Sequence[int],
        settings: SamplingSettings,
        *,
        indices: Sequence[int] | None = None,
        batch: int | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """Latents (n, C, H, W), fp32 on the network's device.

        labels: classes, or numbers of captions. indices: numbers of the images; None: 0 to n - 1.
        batch: latents at a time; None: all. observe: sees every evaluation of the network.
        """
        check_sampling(self.network, self.config, labels, settings, self.prompts)
        indices = range(len(labels)) if indices is None else indices
        watch = None if observe is None else lambda size: observe
        with self.routed():
            batches = self._batches(labels, indices, settings, batch or len(labels), watch)
            return torch.cat(list(batches))

    def images(
        self,
        labels: Sequence[int],
        settings: SamplingSettings,
        *,
        indices: Sequence[int] | None = None,
        batch: int = 50,
        watch: Watch | None = None,
        progress: Progress | None = None,
    ) -> SampledImages:
        """Images of labels, as `latents` has them, with what they cost.

        batch: images at a time. watch: called with each batch's size, gives an observer of its
        evaluations. progress: called with the number of images done, a batch under way in part.
        """
        check_sampling(self.network, self.config, labels, settings, self.prompts)
        indices = range(len(labels)) if indices is None else indices
        with self.routed():
            return self._images(labels, indices, settings, batch, watch, progress)

    def folder(
        self,
        folder: Path,
        request: SampleRequest,
        settings: SamplingSettings,
        *,
        batch: int = 50,
        shard_size: int | None = None,
        ranks: Ranks = Ranks(),  # noqa: B008 (a tuple)
    ) -> SampleResult | None:
        """Make the images of a folder that are missing. Returns None while other ranks still work.

        shard_size: images that are stored, and on a restart made again, together; None: that of a
        folder that was begun, else 50.

        A folder of another model, request, settings, prompts or shard size is refused. batch and
        ranks may change, unless an image depends on its batch (routing pooled or static, sampler
        dopri5).
        """
        check_sampling(self.network, self.config, request.classes, settings, self.prompts)
        if shard_size is None:
            shard_size = shard_size_of(folder)
        if request.number < 1 or batch < 1 or shard_size < 1:
            raise UserError(
                f"{request.number} images in shards of {shard_size}, {batch} at a time: all must "
                "be at least 1"
            )
        plan = {
            **asdict(request),
            **asdict(settings),
            "shard_size": shard_size,
            "dtype": self.dtype,
            "model": self.identity(),
        }
        if isinstance(self.autoencoder, NoDecoder):
            latents = self.model.latents
            plan |= {"content": LATENTS, "autoencoder": latents.autoencoder}
        if self.prompts is not None:
            plan["captions"] = self.prompts.captions
            plan["negative_prompt"] = self.prompts.negative

        def make(indices: Sequence[int], progress: Progress) -> SampledImages:
            labels = [request.label(index, settings.seed) for index in indices]
            return self._images(labels, indices, settings, batch, None, progress)

        topology = self.network.topology
        with self.routed():
            if settings.sampler == "dopri5" or self.network.shares_compute:
                # An image depends on its batch.
                plan |= {"batch": batch, "expert_parallel": topology.expert_parallel}
            return fill_folder(folder, request, plan, make, topology, ranks)

    def _images(
        self,
        labels: Sequence[int],
        indices: Sequence[int],
        settings: SamplingSettings,
        batch: int,
        watch: Watch | None,
        progress: Progress | None,
    ) -> SampledImages:
        if self.autoencoder is None:
            raise ValueError("this sampler has no autoencoder to make images of latents")
        meter, evaluations = CapacityMeter(), list[int]()

        def watched(size: int) -> Observer:
            evaluations.append(0)
            also = None if watch is None else watch(size)

            def observe(forward: Forward) -> None:
                meter(forward)
                evaluations[-1] += not forward.unconditional
                if also is not None:
                    also(forward)

            return observe

        batches = self._batches(labels, indices, settings, batch, watched, progress)
        images = torch.cat([self.autoencoder.decode(latents).cpu() for latents in batches])
        mean = sum(evaluations) / len(evaluations) if settings.sampler == "dopri5" else None
        return SampledImages(images, meter.read(), mean)

    def _batches(
        self,
        labels: Sequence[int],
        indices: Sequence[int],
        settings: SamplingSettings,
        batch: int,
        watch: Watch | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Tensor]:
        """Latents, a batch at a time."""
        for start in range(0, len(labels), batch):
            some = indices[start : start + batch]

            def part_done(fraction: float, start: int = start, size: int = len(some)) -> None:
                if progress is not None:
                    progress(start + fraction * size)

            yield sample_latents(
                self.network,
                self.config,
                labels[start : start + batch],
                some,
                settings,
                prompts=self.prompts,
                observe=None if watch is None else watch(len(some)),
                progress=part_done,
            )
