"""What pipelines are made of: networks, units, samplers, and what attention reads."""
