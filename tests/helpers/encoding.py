"""Image folders packed with the options of all three parts side by side."""

from dataclasses import fields

from diffmoe.prepare.encoding import Encoding, encode_images
from diffmoe.prepare.image_folders import ImageSource
from diffmoe.prepare.sharding import ShardOutput


def encode(images, directory, **options):
    """encode_images, by default with up to 10 bad images as tools/encode_latents.py has it."""
    options = {"max_bad": 10, **options}

    def part(kind, *values):
        names = [field.name for field in fields(kind)]
        return kind(*values, **{name: options.pop(name) for name in names if name in options})

    parts = part(ImageSource, images), part(Encoding), part(ShardOutput, directory)
    return encode_images(*parts, **options)
