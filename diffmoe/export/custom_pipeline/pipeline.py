"""Images of classes or captions from a model of DiffMoE, with torch and diffusers alone.

    pipeline = DiffusionPipeline.from_pretrained(
        FOLDER, custom_pipeline=FOLDER, trust_remote_code=True
    )
    images = pipeline(class_labels=[2, 7], seed=0).images

The images are those that the project's own Pipeline draws of the same seed and settings, up to
floating-point rounding: image k has noise of its own, and does not depend on its batch.
"""

import hashlib
import json
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor, nn

SAMPLERS = {"flow": ("euler", "heun", "sde"), "ddpm": ("ddpm", "ddim")}
SHIFTED = ("euler", "heun", "sde")  # whose steps a shift spaces
STEPS = 1000  # of DDPM
VAE_BATCH = 16  # images that are decoded at a time
Text = tuple[Tensor, Tensor, Tensor | None]
Model = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """How to get from noise to data.

    sampler: euler, heun or sde of a flow, ddpm or ddim of DDPM. guidance_interval: times between
    which guidance acts, 0 is noise and 1 data. guided_channels: guide only the first ones; None:
    all. shift: spacing of a flow's times, above 1 more of them at high noise. eta: noise of ddim.
    """

    sampler: str
    steps: int
    guidance: float
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guided_channels: int | None = None
    shift: float = 1.0
    eta: float = 0.0

    def check(self, objective: str, channels: int) -> None:
        """Raise ValueError where they do not fit the model."""
        known = SAMPLERS[objective]
        if self.sampler not in known:
            raise ValueError(
                f"sampler={self.sampler!r}: this pipeline of a {objective} model has "
                f"{', '.join(known)}; diffmoe.Pipeline has all"
            )
        least = 1 if self.sampler in ("euler", "heun") else 2
        most = STEPS if objective == "ddpm" else math.inf
        if not least <= self.steps <= most:
            raise ValueError(f"num_inference_steps={self.steps}: {self.sampler} takes {least} up")
        if self.guided_channels is not None and not 1 <= self.guided_channels <= channels:
            raise ValueError(f"guided_channels={self.guided_channels}: choose 1 to {channels}")
        if self.shift != 1 and self.sampler not in SHIFTED:
            raise ValueError(f"shift={self.shift} spaces the steps of {', '.join(SHIFTED)} alone")
        if not 1e-3 <= self.shift <= 1e3 or not 0 <= self.eta <= 1:
            raise ValueError(
                f"shift={self.shift}, eta={self.eta}: shift is from 0.001 to 1000, eta from 0 to 1"
            )
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta={self.eta} belongs to the sampler ddim")
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"guidance_interval={low, high}: two rising times from 0 to 1")


class DiffMoEPipeline(DiffusionPipeline):
    """A network with what decodes its latents, and of a text model what encodes its captions."""

    transformer: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    model_cpu_offload_seq: Any = "text_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012 (as in diffusers)

    def __init__(
        self,
        transformer: ModelMixin,
        vae: ModelMixin | None,
        text_encoder: nn.Module | None,
        tokenizer: Any,
        sampling: dict | None = None,
        latents: dict | None = None,
        id2label: dict | None = None,
    ) -> None:
        """vae: None of a model of pixels. text_encoder, tokenizer: the T5 encoder or CLIP text
        model of transformers that a text model was trained with; None of any other model.

        sampling: objective, the shift of training, and whether it can be guided. latents: of a
        LatentSpec of DiffMoE. id2label: names of classes. All come with the folder.
        """
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(sampling=sampling, latents=latents, id2label=id2label)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | str | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        seed: int = 0,
        capacity: float | None = None,
        batch_size: int = 50,
        **sampling: Any,
    ) -> ImagePipelineOutput:
        """An image per class label, a number or a name; of a text model an image per prompt.

        guidance_scale: None: 1.5, or 1 for a model trained without label dropout. capacity: a
        calibrated one, the mean number of experts that work on a token; None: that of training.
        batch_size: images at a time. sampling: other fields of `Settings`. Raises ValueError before
        any work for what does not fit, and for latents that are not finite.
        """
        model, trained = self.transformer.config.model, self.config["sampling"]
        captions = [prompt] if isinstance(prompt, str) else list(prompt or ())
        if (model["text"] is None) == bool(captions):
            raise ValueError(
                "give class_labels=[...] to a model of classes, prompt=... to a text model"
            )
        if negative_prompt is not None and not captions:
            raise ValueError("negative_prompt belongs to a text model")
        numbers = list(range(len(captions))) if captions else self._class_numbers(class_labels)
        can_guide = trained["can_guide"] or negative_prompt is not None
        sampler = sampling.pop("sampler", None) or SAMPLERS[trained["objective"]][0]
        if sampling.get("shift") is None:
            sampling["shift"] = trained["shift"] if sampler in SHIFTED else 1.0
        if guidance_scale is None:
            guidance_scale = 1.5 if can_guide else 1.0
        settings = Settings(sampler, num_inference_steps, guidance_scale, **sampling)
        settings.check(trained["objective"], model["in_channels"])
        if settings.guidance != 1 and not can_guide:
            raise ValueError(
                f"guidance_scale={settings.guidance}: the model was trained without label dropout, "
                "so there is nothing to guide away from; use 1, or a text model's negative_prompt"
            )
        if negative_prompt is not None and settings.guidance == 1:
            raise ValueError("a negative prompt acts through guidance; set guidance_scale above 1")
        self.transformer.thresholds_of(capacity)
        self._check_parts()
        images = []
        with self.progress_bar(total=len(numbers)) as progress:
            for start in range(0, len(numbers), batch_size):
                chosen = range(start, min(start + batch_size, len(numbers)))
                wanted: dict[str, Any]
                if captions:
                    wanted = {"text": self._encode([captions[k] for k in chosen])}
                else:
                    labels = torch.tensor(
                        [numbers[k] for k in chosen], device=self._execution_device
                    )
                    wanted = {"class_labels": labels}
                null = self._null(wanted, negative_prompt)
                latents = self._sample(wanted, null, capacity, settings, (seed, chosen))
                images += self._decode(latents)
                progress.update(len(chosen))
        return ImagePipelineOutput(images=images)

    def _class_numbers(self, labels: Sequence[int | str] | str | None) -> list[int]:
        names = {name: int(number) for number, name in (self.config["id2label"] or {}).items()}
        given = [labels] if isinstance(labels, str) else list(labels if labels is not None else ())
        numbers = [
            names.get(one, -1) if isinstance(one, str) else operator.index(one) for one in given
        ]
        classes = self.transformer.config.model["num_classes"]
        for one, number in zip(given, numbers, strict=True):
            if not 0 <= number < classes:
                raise ValueError(
                    f"class {one!r} is neither of 0..{classes - 1} nor one of the names"
                )
        if not numbers:
            raise ValueError("class_labels asks for no image; give one label per image")
        return numbers

    def _check_parts(self) -> None:
        """Raise ValueError where a part that does not lie in the folder is missing or another."""
        name = self.config["latents"]["autoencoder"]
        if self.vae is None and name != "identity":
            raise ValueError(f"the autoencoder {name} is missing; give from_pretrained vae=...")
        text = self.transformer.config.model["text"]
        if text is None or text["encoder"] == "bytes":
            return
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                f"the text encoder {text['encoder']} is missing; give from_pretrained "
                "text_encoder=... and tokenizer=..."
            )
        if not text["encoder"].endswith(checksum_of(self.text_encoder, self.tokenizer)):
            raise ValueError(
                f"text_encoder and tokenizer are not those of {text['encoder']}, with which the "
                "model was trained; give them in float32"
            )

    def _encode(self, captions: list[str]) -> Text:
        """Captions as one batch, padded with zeros to the model's length."""
        text, device = self.transformer.config.model["text"], self._execution_device
        B, L = len(captions), text["length"]
        if text["encoder"] == "bytes":
            rows = [torch.tensor(list(line.encode()[:L]), dtype=torch.long) for line in captions]
            tokens = torch.zeros(B, L, dtype=torch.long)
            for row, values in zip(tokens, rows, strict=True):
                row[: len(values)] = values
            lengths_B1 = torch.tensor([[len(row)] for row in rows])
            return tokens.to(device), (torch.arange(L) < lengths_B1).to(device), None
        self.tokenizer.padding_side = "right"
        ids = self.tokenizer(
            captions, padding=True, truncation=True, max_length=L, return_tensors="pt"
        ).to(device)
        output = self.text_encoder(input_ids=ids.input_ids, attention_mask=ids.attention_mask)
        mask_BL = ids.attention_mask.bool()
        features_BLD = output.last_hidden_state.masked_fill(~mask_BL[..., None], 0)
        more = L - mask_BL.shape[1]
        features_BLD = nn.functional.pad(features_BLD, (0, 0, 0, more))
        pooled = output.pooler_output if text["pooled"] else None
        return features_BLD, nn.functional.pad(mask_BL, (0, more)), pooled

    def _null(self, wanted: dict[str, Any], negative: str | None) -> dict[str, Any]:
        """The condition that guidance leads away from: the null label or caption, or a caption."""
        if "text" not in wanted:
            labels = wanted["class_labels"]
            return {"class_labels": torch.full_like(labels, self.transformer.null_label)}
        tokens, mask_BL, pooled = wanted["text"]
        if negative is not None:
            return {"text": self._encode([negative] * len(mask_BL))}
        return {"text": (tokens, torch.zeros_like(mask_BL), pooled)}

    def _sample(
        self,
        wanted: dict[str, Any],
        null: dict[str, Any],
        capacity: float | None,
        settings: Settings,
        noise_of: tuple[int, range],
    ) -> Tensor:
        """Latents (n, C, H, W) in fp32. noise_of: the seed and the numbers of the images."""
        model, objective = self.transformer.config.model, self.config["sampling"]["objective"]
        sides, channels = model["input_size"], model["in_channels"]
        height, width = (sides, sides) if isinstance(sides, int) else sides
        noise = Noise(*noise_of, (channels, height, width), self._execution_device)
        interval = None
        if tuple(settings.guidance_interval) != (0, 1):
            interval = settings.guidance_interval
            if objective == "ddpm":
                interval = (STEPS * (1 - interval[1]), STEPS * (1 - interval[0]))
        last = settings.guided_channels or channels

        def predict(x: Tensor, t: Tensor) -> Tensor:
            """Guided in the first channels; with DDPM the variance follows, where there is one."""
            out = self.transformer(x, t, capacity=capacity, **wanted).float()
            if objective == "flow":
                out = out[:, :channels]
            if settings.guidance == 1 or (
                interval and not interval[0] <= float(t[0]) <= interval[1]
            ):
                return out
            away = self.transformer(x, t, capacity=capacity, **null)[:, :last].float()
            return torch.cat([away + settings.guidance * (out[:, :last] - away), out[:, last:]], 1)

        x = noise.draw()
        walk = sample_flow if objective == "flow" else sample_ddpm
        latents = walk(predict, x, settings, noise.draw)
        if not latents.isfinite().all():
            raise ValueError("the latents are not finite; lower guidance_scale, or take more steps")
        return latents

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        spec = self.config["latents"]
        scale, shift = (
            torch.as_tensor(spec[name]).to(latents).reshape(-1, 1, 1) for name in ("scale", "shift")
        )
        z, (black, white) = latents / scale + shift, spec["pixel_range"]
        if self.vae is None:
            pixels, black, white = z, -1.0, 1.0
        else:
            of_videos = any(isinstance(part, nn.Conv3d) for part in self.vae.modules())
            parts = []
            for part in z.to(self.vae.dtype).split(VAE_BATCH):
                decoded = self.vae.decode(part[:, :, None] if of_videos else part).sample
                parts.append(decoded[:, :, 0] if of_videos else decoded)
            pixels = torch.cat(parts)
        pixels = (pixels.float() - black) / (white - black) * 2 - 1
        if pixels.isnan().any():
            raise ValueError("the autoencoder gave NaN, which would be black images; use float32")
        levels = (pixels * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        arrays = levels.permute(0, 2, 3, 1).cpu().numpy()
        return [
            Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)
            for array in arrays
        ]


class Noise:
    """Noise of some images of one seed: each has a generator of its own, whatever its batch."""

    def __init__(
        self, seed: int, numbers: range, shape: tuple[int, ...], device: torch.device
    ) -> None:
        self._shape, self._device = shape, device
        self._generators = []
        for number in numbers:
            key = repr((seed, "sample", number)).encode()
            digest = hashlib.blake2b(key, digest_size=8).digest()
            own = int.from_bytes(digest, "little", signed=True)
            self._generators.append(torch.Generator().manual_seed(own))

    def draw(self) -> Tensor:
        """The next standard normal numbers, (n, C, H, W) fp32."""
        drawn = [torch.randn(self._shape, generator=one) for one in self._generators]
        return torch.stack(drawn).to(self._device)


def sample_flow(
    velocity: Model, x: Tensor, settings: Settings, draw: Callable[[], Tensor]
) -> Tensor:
    """From noise at t = 0 to data at t = 1: Euler, Heun, or SiT's SDE (arXiv 2401.08740, Eq. 5)."""

    def slope(x: Tensor, t: float) -> Tensor:
        return velocity(x, torch.full((len(x),), t, dtype=torch.float32, device=x.device))

    if settings.sampler == "sde":
        last = max(0.04, 1 / settings.steps)  # of the stiff end, at once
        times = [(1 - last) * t for t in time_grid(settings.steps - 1, settings.shift)]
        for t, t_next in pairwise(times):
            dt = t_next - t
            drift = (1 + t) * slope(x, t) - x
            x = x + dt * drift + (2 * (1 - t) * dt) ** 0.5 * draw()
        return x + last * slope(x, 1 - last)
    for t, t_next in pairwise(time_grid(settings.steps, settings.shift)):
        here = slope(x, t)
        if settings.sampler == "heun":
            here = (here + slope(x + (t_next - t) * here, t_next)) / 2
        x = x + (t_next - t) * here
    return x


def time_grid(steps: int, shift: float) -> list[float]:
    """steps + 1 times from 0 to 1; shift: above 1, more of them at high noise."""
    shares = [1 - i / steps for i in range(steps + 1)]
    return [1 - shift * share / (1 + (shift - 1) * share) for share in shares]


def sample_ddpm(model: Model, x: Tensor, settings: Settings, draw: Callable[[], Tensor]) -> Tensor:
    """Over evenly spaced steps of DDPM's 1,000 (linear betas), by its posterior or as DDIM.

    model: gives epsilon (n, C, ...), or with it the variance's share between its bounds.
    """
    betas = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
    kept, stride = list[int](), (STEPS - 1) / (settings.steps - 1)
    position = 0.0
    for _ in range(settings.steps):
        kept.append(round(position))
        position += stride
    signal = (1 - betas).cumprod(0)[kept]
    signal_before = torch.cat([signal.new_ones(1), signal[:-1]])
    betas = 1 - signal / signal_before
    posterior = betas * (1 - signal_before) / (1 - signal)
    low = torch.cat([posterior[1:2], posterior[1:]]).log()
    fixed = torch.cat([posterior[1:2], betas[1:]]).log()
    channels = x.shape[1]
    for i in reversed(range(settings.steps)):
        out = model(x, torch.full((len(x),), kept[i], device=x.device))
        here, before, beta = float(signal[i]), float(signal_before[i]), float(betas[i])
        data = here**-0.5 * x - (1 / here - 1) ** 0.5 * out[:, :channels]
        if settings.sampler == "ddim":
            sigma = settings.eta * ((1 - before) / (1 - here) * (1 - here / before)) ** 0.5
            epsilon = (here**-0.5 * x - data) / (1 / here - 1) ** 0.5
            x = before**0.5 * data + (1 - before - sigma**2) ** 0.5 * epsilon
            deviation: float | Tensor = sigma
        else:
            by_data = beta * before**0.5 / (1 - here)
            by_x = (1 - before) * (1 - beta) ** 0.5 / (1 - here)
            log_variance: float | Tensor = float(fixed[i])
            if out.shape[1] > channels:
                share = (out[:, channels:] + 1) / 2
                log_variance = share * float(betas[i].log()) + (1 - share) * float(low[i])
            x = by_data * data + by_x * x
            deviation = torch.exp(0.5 * torch.as_tensor(log_variance))
        if settings.sampler == "ddpm" or settings.eta:
            noise = draw()
            if i > 0:
                x = x + deviation * noise
    return x


def checksum_of(encoder: nn.Module, tokenizer: Any) -> str:
    """Of the weights and the vocabulary, by which a text model knows its encoder."""
    digests = sorted(
        hashlib.sha256(parameter.detach().float().cpu().contiguous().numpy().data).hexdigest()
        for parameter in encoder.parameters()
    )
    digests.append(json.dumps(sorted(tokenizer.get_vocab().items())))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]
