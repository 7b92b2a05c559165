"""Arguments, recipes, the Trainer, and what keeps a run sound."""
