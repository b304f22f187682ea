"""The compute dial: what a model computes, and thresholds that meet a requested capacity C."""
