"""Toy data sets of digits, and classifiers that judge samples of them."""
