"""Checkpoints of a run: store, catalogue, saver, retention, provenance and downloads."""
