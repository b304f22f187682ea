"""How fast the layer, the step and sampling are, beside what they are held against."""
