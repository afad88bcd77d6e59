"""What training writes beside the run: the metrics file."""
