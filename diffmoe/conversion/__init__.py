"""Other projects' weights, to ours and back; dense models to mixtures of experts (upcycling).

Start with foreign.py, which reads and writes their files. layouts.py: tables of names, which
release.py and hugging_face.py fill. detect_format.py: any path as a source.
"""
