"""Templates: plug-in models that turn a user's input (a brightness, an image, a control) into inputs of the base model.

A template is a folder with a `model.py`, see docs/templates.md. `TemplatePipeline` samples with any number of them.
"""

from ...core.loader import ModelConfig, load_state_dict
from .model import load_template_model
from .pipeline import TemplatePipeline, Templates

__all__ = ["ModelConfig", "TemplatePipeline", "Templates", "load_state_dict", "load_template_model"]
