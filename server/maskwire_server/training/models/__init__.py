"""Models: the built-in encoder, the networks made of it, and the import and export of weights."""
