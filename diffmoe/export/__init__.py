"""The inference format, and opening any model by its path.

Start with open.py (load, open_network). exported_model.py describes the folder, metadata.py its
config.json, writing.py writes it.
"""
