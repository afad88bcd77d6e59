"""Several processes (ranks) behind the trainer's interface: one leader, which serves, and its followers."""
