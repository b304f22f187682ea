"""From a trained network to samples: settings, the compute dial, many samples on many ranks."""
