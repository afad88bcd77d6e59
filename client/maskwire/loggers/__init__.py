"""Reports of training: the metrics file and progress."""
