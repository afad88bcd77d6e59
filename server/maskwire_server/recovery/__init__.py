"""Recovery: boot, replay, environment fingerprint, point in time, verification."""
