"""One run: admission, the step queue, the executor, the committer and sessions."""
