"""Latents on disk and the streams that read them: manifest, packing, lanes, stream."""
