"""The parts of a pipeline: networks, units, samplers, requests, media, and inputs of attention."""
