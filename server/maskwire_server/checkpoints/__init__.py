"""Checkpoints of a run: store, catalogue, saver, retention, membership and downloads."""
