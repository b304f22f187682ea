"""From a trained network to images: `sampler.Sampler`, batches, folders on many ranks."""
