"""The method: pipelines as units, noise schedules, objectives, adapters and the training loop. Names no model."""
