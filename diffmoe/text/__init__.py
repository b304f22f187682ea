"""From captions to what a model is conditioned on: encoders and prompts."""
