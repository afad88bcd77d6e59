"""Models from every source, the networks made of them, and the import and export of weights."""
