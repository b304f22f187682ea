"""Draws images with the network of this folder. Needs torch alone, not diffmoe.

  python sample.py --classes 2,7 --per-class 4 --steps 50 --guidance 1.5 --out images.png
  python sample.py --classes 2 --out latents.pt       what the network draws, not decoded
  python sample.py --about                            what is known about the network

network.pt2 is read by torch.export.load, network.onnx by onnxruntime. Of a network that draws
latents of an autoencoder, --out is a .pt of them, (N, C, H, W) as its decoder takes them. Where
--about says that routing is static, the images of a batch share their compute: another --batch
gives slightly different images.

From Python: network, about = load("network.pt2"); latents = draw(network, about, [2, 7]).
"""

import argparse
import hashlib
import json
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# (x, t, labels) -> prediction: (B, C, H, W) fp32, (B,) fp32, (B,) int64 -> (B, C or 2C, H, W) fp32.
Network = Callable[[Tensor, Tensor, Tensor], Tensor]
# One evaluation with guidance: x and a single t.
Model = Callable[[Tensor, float], Tensor]
Draw = Callable[[], Tensor]

ABOUT = "about.json"  # in network.pt2; in network.onnx the metadata entry of that name
SAMPLERS = {"flow": ("euler", "heun"), "ddpm": ("ddpm", "ddim")}  # the first is the default


def load(path: str | Path, device: str = "cpu") -> tuple[Network, dict[str, Any]]:
    """The network of a file, ready to be called, and what is known about it, with its device.

    A network.onnx is computed on the CPU whatever the device.
    """
    if Path(path).suffix == ".onnx":
        network, text = _load_onnx(path)
        return network, json.loads(text) | {"device": device}
    files = {ABOUT: ""}
    program = torch.export.load(path, extra_files=files)
    if device != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    return program.module(), json.loads(files[ABOUT]) | {"device": device}


def _load_onnx(path: str | Path) -> tuple[Network, str]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)

    def network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        fed = {"x": x.cpu().numpy(), "t": t.cpu().numpy(), "labels": labels.cpu().numpy()}
        return torch.from_numpy(session.run(None, fed)[0]).to(x.device)

    return network, session.get_modelmeta().custom_metadata_map[ABOUT]


@torch.inference_mode()
def draw(
    network: Network,
    about: dict[str, Any],
    labels: Sequence[int],
    *,
    seed: int = 0,
    steps: int = 50,
    guidance: float | None = None,
    sampler: str | None = None,
    batch: int = 50,
) -> Tensor:
    """Latents (N, C, H, W) fp32 of N labels; image k of a seed has noise of its own.

    guidance: None: 1.5, or 1 of a network that was trained without label dropout. sampler: None:
    euler of a flow, ddpm of a diffusion. batch: images at a time. Raises ValueError for what does
    not fit the network.
    """
    objective, number = about["objective"], about["num_classes"]
    sampler = sampler or SAMPLERS[objective][0]
    if guidance is None:
        guidance = 1.5 if about["can_guide"] else 1.0
    if sampler not in SAMPLERS[objective]:
        raise ValueError(f"sampler {sampler}: choose {' or '.join(SAMPLERS[objective])}")
    if not labels or not all(0 <= label < number for label in labels):
        raise ValueError(f"labels {list(labels)}: choose from 0 to {number - 1}")
    if guidance != 1 and not about["can_guide"]:
        raise ValueError(f"guidance {guidance:g}: trained without label dropout; choose 1")
    least = 1 if objective == "flow" else 2
    if not least <= steps <= 1000 or batch < 1:
        raise ValueError(
            f"steps {steps}, batch {batch}: {least} to 1000 steps, a batch of 1 or more"
        )
    device, parts = about["device"], []
    for start in range(0, len(labels), batch):
        some = torch.tensor(labels[start : start + batch], device=device)
        noise = _noise(seed, range(start, start + len(some)), about["shape"])
        model = _guided(network, about, some, guidance)
        x = noise().to(device)
        if objective == "flow":
            parts.append(_flow(model, x, steps, about["shift"], sampler == "heun"))
        else:
            parts.append(_diffusion(model, x, steps, about["betas"], noise, sampler == "ddim"))
    latents = torch.cat(parts)
    if not latents.isfinite().all():
        raise ValueError("latents are not finite: lower the guidance, or take more steps")
    return latents


def _noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Draw:
    """Draws (n, *shape): of each image from a generator that its number and the seed determine."""
    generators = []
    for index in indices:
        key = repr((seed, "sample", index)).encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        number = int.from_bytes(digest, "little", signed=True)
        generators.append(torch.Generator().manual_seed(number))
    return lambda: torch.stack([torch.randn(*shape, generator=g) for g in generators])


def _guided(network: Network, about: dict[str, Any], labels: Tensor, guidance: float) -> Model:
    """Classifier-free guidance, in two calls: they must not share their compute."""
    channels = about["shape"][0]
    null = torch.full_like(labels, about["null_label"])

    def model(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), float(t), device=x.device)
        wanted = network(x, times, labels)
        if guidance == 1:
            return wanted
        away = network(x, times, null)[:, :channels]
        steered = away + guidance * (wanted[:, :channels] - away)
        return torch.cat([steered, wanted[:, channels:]], dim=1)

    return model


def _flow(model: Model, x: Tensor, steps: int, shift: float, heun: bool) -> Tensor:
    """Follow dx/dt = prediction from t = 0, noise, to t = 1, data. shift: of the steps to noise."""
    channels = x.shape[1]
    shares = [1 - i / steps for i in range(steps + 1)]
    times = [1 - shift * share / (1 + (shift - 1) * share) for share in shares]
    for t, t_next in pairwise(times):
        slope = model(x, t)[:, :channels]
        if heun:
            slope = (slope + model(x + (t_next - t) * slope, t_next)[:, :channels]) / 2
        x = x + (t_next - t) * slope
    return x


def _diffusion(
    model: Model, x: Tensor, steps: int, betas: dict[str, Any], draw: Draw, ddim: bool
) -> Tensor:
    """Ancestral sampling (arXiv 2102.09672), or DDIM without noise (arXiv 2010.02502)."""
    channels = x.shape[1]
    linear = torch.linspace(betas["first"], betas["last"], betas["steps"], dtype=torch.float64)
    chosen, place = [], 0.0
    for _ in range(steps):
        chosen.append(round(place))
        place += (betas["steps"] - 1) / (steps - 1)
    abar = (1 - linear).cumprod(0)[chosen]
    before = torch.cat([abar.new_ones(1), abar[:-1]])
    beta = 1 - abar / before
    posterior = beta * (1 - before) / (1 - abar)
    for i in reversed(range(steps)):
        out = model(x, chosen[i])
        a, b, epsilon = float(abar[i]), float(before[i]), out[:, :channels]
        data = (x - (1 - a) ** 0.5 * epsilon) / a**0.5
        if ddim:
            x = b**0.5 * data + (1 - b) ** 0.5 * epsilon
            continue
        to_data = float(beta[i]) * b**0.5 / (1 - a)
        x = to_data * data + (1 - b) * (a / b) ** 0.5 / (1 - a) * x
        if i:
            low, high = float(posterior[i].log()), float(beta[i].log())
            # Without channels of it, the variance is beta.
            learned = out[:, channels:]
            weight = (learned + 1) / 2 if learned.shape[1] else torch.ones_like(x)
            x = x + torch.exp(0.5 * (weight * high + (1 - weight) * low)) * draw().to(x)
    return x


def unscaled(latents: Tensor, about: dict[str, Any]) -> Tensor:
    """Latents as the autoencoder's decoder takes them, or pixels, -1 to 1."""
    scale, shift = (
        torch.tensor(about["latents"][name]).to(latents).reshape(-1, 1, 1)
        for name in ("scale", "shift")
    )
    return latents / scale + shift


def to_images(latents: Tensor, about: dict[str, Any]) -> Tensor:
    """uint8 images (N, H, W, C) of a network that draws pixels."""
    pixels = unscaled(latents, about).clamp(-1, 1)
    levels = (pixels.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().contiguous()


def write_png(path: str | Path, images: Tensor, columns: int) -> None:
    """One picture of uint8 images (N, H, W, 1 or 3), row by row."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    placed = images.new_zeros(rows * columns, height, width, channels)
    placed[:n] = images
    placed = placed.view(rows, columns, height, width, channels).transpose(1, 2)
    lines = placed.reshape(rows * height, columns * width * channels)
    # Each line starts with the number of its filter, 0 for none.
    filtered = torch.cat([lines.new_zeros(len(lines), 1), lines], dim=1)
    color = {1: 0, 3: 2}[channels]
    header = struct.pack(">IIBBBBB", columns * width, rows * height, 8, color, 0, 0, 0)
    data = zlib.compress(bytes(filtered.flatten().tolist()))
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, content in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
            file.write(struct.pack(">I", len(content)) + kind + content)
            file.write(struct.pack(">I", zlib.crc32(kind + content)))


def label_of(name: str, about: dict[str, Any]) -> int:
    """A class by its number or name. Raises ValueError for one that there is not."""
    names = about["class_names"] or []
    if name in names:
        return names.index(name)
    if not name.isdecimal():
        raise ValueError(f"class {name!r}: give a number, or one of {', '.join(names) or 'none'}")
    return int(name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = Path(__file__).parent
    there = [folder / name for name in ("network.pt2", "network.onnx")]
    default = next((path for path in there if path.exists()), there[0])
    parser.add_argument("--network", type=Path, default=default, help="default: beside this file")
    parser.add_argument(
        "--about", action="store_true", help="print what is known about it, no more"
    )
    parser.add_argument("--classes", help="numbers or names, such as 2,7 (default: all)")
    parser.add_argument("--per-class", type=int, default=1, help="images per class (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50, help="default 50")
    parser.add_argument("--guidance", type=float, help="default 1.5, where it was trained for that")
    parser.add_argument("--sampler", help="euler (default) or heun; ddpm (default) or ddim")
    parser.add_argument("--batch", type=int, default=50, help="images at a time (default 50)")
    parser.add_argument("--device", default="cpu", help="such as cuda (default cpu)")
    parser.add_argument("--out", type=Path, default=Path("images.png"), help="a .png, or .pt")
    options = parser.parse_args()
    try:
        network, about = load(options.network, options.device)
        if options.about:
            print(json.dumps(about, indent=1))
            return
        in_pixels = about["latents"]["autoencoder"] == "identity" and about["shape"][0] in (1, 3)
        if options.out.suffix == ".png" and not in_pixels:
            raise ValueError(
                f"--out {options.out}: the network draws latents of "
                f"{about['latents']['autoencoder']}; give a .pt"
            )
        classes = (
            [label_of(name, about) for name in options.classes.split(",")]
            if options.classes
            else range(about["num_classes"])
        )
        labels = [label for label in classes for _ in range(options.per_class)]
        latents = draw(
            network,
            about,
            labels,
            seed=options.seed,
            steps=options.steps,
            guidance=options.guidance,
            sampler=options.sampler,
            batch=options.batch,
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    if options.out.suffix == ".png":
        write_png(options.out, to_images(latents, about), options.per_class)
    else:
        torch.save(unscaled(latents, about).cpu(), options.out)
    print(f"{options.out}: {len(labels)} of {len(classes)} classes")


if __name__ == "__main__":
    main()
