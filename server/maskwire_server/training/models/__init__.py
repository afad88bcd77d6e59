"""Models: the built-in encoder, its networks, and weights from and for elsewhere."""
