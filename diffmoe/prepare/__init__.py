"""Image folders, captions and other projects' latents into shards; resharding and checking them."""
