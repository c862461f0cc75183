"""Find a model's files, on this machine or on a hub, and load them into a module."""

from .building import build_module
from .fingerprints import fingerprint, fingerprint_folder
from .foreign import read_object, read_pretrained
from .model_config import ModelConfig, NotInRepository, refuse_pickle
from .names import Layout, to_released_keys, use_layouts
from .safetensors_files import load_state_dict, read_metadata, read_shapes, save_safetensors
from .weights import check_weights, drop_weights, load_model, load_weights

__all__ = [
    "Layout",
    "ModelConfig",
    "NotInRepository",
    "build_module",
    "check_weights",
    "drop_weights",
    "fingerprint",
    "fingerprint_folder",
    "load_model",
    "load_state_dict",
    "load_weights",
    "read_metadata",
    "read_object",
    "read_pretrained",
    "read_shapes",
    "refuse_pickle",
    "save_safetensors",
    "to_released_keys",
    "use_layouts",
]
