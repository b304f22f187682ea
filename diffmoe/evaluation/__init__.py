"""Measures the quality of images.

fid.py, kid.py, inception_score.py and precision_recall.py compute metrics of features.
extractors.py computes features, references.py what they are compared with, image_sets.py opens
images. results.py: measuring, and results.jsonl. curves.py: plots of it.
"""
