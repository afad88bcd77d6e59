"""Order, and what is kept: admission, the engine, the journal, checkpoints and recovery."""
