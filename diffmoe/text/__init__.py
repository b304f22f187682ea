"""Captions into what a model is conditioned on: encoders, and their features beside the data."""
