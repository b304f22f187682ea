"""The compute dial: what a model computes, and thresholds that meet a wanted capacity C."""
