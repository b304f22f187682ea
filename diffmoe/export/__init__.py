"""The inference format, and the front door: any model of ours by its path."""
