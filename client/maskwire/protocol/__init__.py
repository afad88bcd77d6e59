"""The protocol without I/O: calls, the writer's session, evaluation, generation, download, fit, messages."""
