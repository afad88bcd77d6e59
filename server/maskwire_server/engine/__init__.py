"""The engine that serves one run: admission, the queue, the executor, the committer and sessions."""
