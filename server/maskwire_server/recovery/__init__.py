"""Recovery of a run: boot, rebuilding the state, replay, fingerprint, point in time and verification."""
