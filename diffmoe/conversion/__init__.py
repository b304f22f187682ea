"""Other projects' weights, in and out; a dense model into a mixture."""
