"""Templates: plug-in models that turn an input (a brightness, an image, a control) into what the base model reads.

A template is a folder with a `model.py`, see docs/templates.md. `TemplatePipeline` draws with any number of them.
"""

from ...core.loader import ModelConfig
from .model import load_state_dict, load_template_model
from .pipeline import TemplatePipeline, Templates

__all__ = ["ModelConfig", "TemplatePipeline", "Templates", "load_state_dict", "load_template_model"]
