"""Code that goes verbatim into a model's folder, for diffusers: no module here imports the package.

pipeline.py: from noise to images. diffmoe_transformer.py: the network.
"""
