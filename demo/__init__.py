"""`python -m demo`: train on real text through a real server, kill it in the middle, and resume."""
