"""A trainer on several processes (ranks): one leader, which serves the run, and its followers."""
