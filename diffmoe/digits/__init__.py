"""The toy data sets, and the classifiers that judge samples of them."""
