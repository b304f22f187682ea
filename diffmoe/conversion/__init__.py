"""One inference format, and a way in and out for everyone's weights."""
