"""Everything that uses torch: model, objective, optimizer and trainer."""
