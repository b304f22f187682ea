"""From a trained network to images: settings, one batch, many images on many ranks."""
