"""Prompts as text embeddings: the base class of the units that compute them, and the layers of language models."""
