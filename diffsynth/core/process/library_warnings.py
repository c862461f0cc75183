"""Drops warnings of libraries that neither name a fault nor ask anything of this program's user; their others stay."""

import logging
import warnings

NEEDLESS = {  # a part of the text by the library's logger
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # an optional kernel
    "DeepSpeed": "Setting accelerator to CPU.",  # the run's `device` says so already
    "transformers.utils.import_utils": "requires torchvision (not installed)",  # Pillow's does the same
    "diffusers.models.modeling_utils": "that should be kept in float32: [].",  # none
}
TEXTS = (  # the beginnings of warnings, as regular expressions
    "Already found a `peft_config` attribute in the model",  # several adapters in a network are what is wanted
    r"`\w+PosEmbed` is deprecated",  # diffusers' own networks use such classes
)


class _Lacks(logging.Filter):
    """Drops the log records that have a text."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()


_filters = {name: _Lacks(text) for name, text in NEEDLESS.items()}  # a logger takes each of these once


def drop_needless_warnings() -> None:
    """Drop these warnings from now on; the libraries need not be imported yet."""
    for name, needless in _filters.items():
        logging.getLogger(name).addFilter(needless)
    for text in TEXTS:
        warnings.filterwarnings("ignore", text)
