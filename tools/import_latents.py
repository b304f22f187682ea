"""Convert latents cached by another project into a data folder for training.

  python tools/import_latents.py --format mar --latents imagenet_cached --scale 0.18215 \\
      --vae stabilityai/sd-vae-ft-mse --out data/imagenet256

The formats, and the flags for what their files do not say:
  fast-dit      *_features/N.npy and *_labels/N.npy: drawn samples, already scaled by 0.18215 and
                mirrored at random. --classes --vae
  mar           CLASS/NAME.npz with moments and moments_flip (mean and log-variance, unscaled): MAR,
                and the DiffMoE release. --scale (0.2325 for MAR's KL-16, 0.18215 for SD) --vae
  dcae          CLASS/NAME.npy of efficientvit's DC-AE, scaled.
                --scale (the scaling_factor that they were generated with) --vae
  repa          NNNNN/img-mean-std-NNNNNNNN.npy (mean and standard deviation) and dataset.json; the
                folder vae-sd, or a zip file of it. --classes --vae
  edm2          the same, but for pixels in 0..1, whitened per channel. --classes --vae
  lightningdit  *.safetensors with latents, latents_flip, labels, and latents_stats.pt (or --stats).
                --multiplier (latent_multiplier of its config; 1 for VA-VAE) --classes --vae
  webdataset    *.tar of KEY.npy and KEY.cls; also .tar.gz, .tar.bz2, .tar.xz, .tar.zst.
                --content --scaled yes|no --scale (--shift) --classes --vae

--vae is only recorded, for decoding samples later: a hub id or folder of a diffusers autoencoder,
or any name if it is another autoencoder. The model is trained on (z - shift) * scale. --classes is
the model's number of classes, including those that no label mentions.

The command can be interrupted at any time; running it again resumes after the finished shards.
Check the result with tools/check_data.py: a standard deviation far from 1 means a wrong scale.
"""

import argparse

from diffmoe.errors import run_command

FORMATS = ("fast-dit", "mar", "dcae", "repa", "edm2", "lightningdit", "webdataset")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--latents", required=True, metavar="DIR", help="the cached latents")
    parser.add_argument("--out", required=True, metavar="DIR", help="the data folder to write")
    parser.add_argument("--vae", metavar="NAME", help="the autoencoder that made the latents")
    parser.add_argument("--classes", type=int, metavar="N", help="number of classes")
    parser.add_argument("--content", choices=["sample", "mean_logvar", "mean_std"])
    parser.add_argument(
        "--scaled", choices=["yes", "no"], help="scale and shift are already applied"
    )
    parser.add_argument(
        "--scale", type=float, nargs="+", metavar="X", help="one, or one per channel"
    )
    parser.add_argument(
        "--shift", type=float, nargs="+", metavar="X", help="one, or one per channel"
    )
    parser.add_argument("--multiplier", type=float, metavar="X", help="for lightningdit: see above")
    parser.add_argument("--stats", metavar="FILE", help="for lightningdit: latents_stats.pt")
    parser.add_argument(
        "--pixel-range",
        type=float,
        nargs=2,
        metavar="X",
        help="black and white; default -1 1",
    )
    parser.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        default="float16",
        help="default float16",
    )
    parser.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="tar files; default one per 1,000 samples, at least 32 (a run needs one per lane)",
    )
    parser.add_argument(
        "--max-bad", type=int, default=0, metavar="N", help="samples that may be skipped; default 0"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the contents of --out")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from diffmoe.prepare.foreign_latents import import_latents
    from diffmoe.prepare.sharding import ShardOutput
    from diffmoe.work import Ranks

    output = ShardOutput(
        options.out, options.shards, options.max_bad, options.overwrite, Ranks.of_environment()
    )
    answers = {
        "vae": options.vae,
        "classes": options.classes,
        "content": options.content,
        "scaled": None if options.scaled is None else options.scaled == "yes",
        "scale": _number_or_list(options.scale),
        "shift": _number_or_list(options.shift),
        "multiplier": options.multiplier,
        "pixel_range": options.pixel_range,
    }
    manifest = import_latents(
        options.format,
        options.latents,
        output,
        answers=answers,
        stats=options.stats,
        dtype=options.dtype,
    )
    print(output.summary(manifest))


def _number_or_list(values: list[float] | None) -> float | list[float] | None:
    return values[0] if values is not None and len(values) == 1 else values


if __name__ == "__main__":
    run_command(main)
