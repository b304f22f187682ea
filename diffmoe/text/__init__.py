"""Captions into what a model is conditioned on: encoders and prompts."""
