"""Latents on disk and the streams that read them: manifest, packing, lanes, shards, autoencoder."""
