"""Shards of latents and how training reads them: manifest, packing, lanes, stream."""
