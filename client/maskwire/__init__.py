"""maskwire."""
