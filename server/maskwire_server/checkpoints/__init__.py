"""Checkpoints: store, saver, retention, membership and download."""
