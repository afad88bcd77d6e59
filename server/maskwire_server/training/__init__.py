"""All that knows torch: the model, the objective, the optimizer and the trainer."""
