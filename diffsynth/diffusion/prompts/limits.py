"""How much of a prompt the text encoders read, and warnings of the rest; needs tokenizers and no weights."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline

logger = logging.getLogger(__name__)

LENGTH = "max_sequence_length"
SHOWN = 60  # characters of a prompt, and of what is cut off


def length_key(pipe: "BasePipeline") -> str | None:
    """The key of the configuration that sets how many tokens of a prompt are read; None if the family has none."""
    return f"model.{LENGTH}" if LENGTH in pipe.model_settings else None


def warn_of_long_prompts(pipe: "BasePipeline", requests: Iterable[Mapping[str, Any]]) -> None:
    """Log a warning of each prompt that has more tokens than a text encoder reads, once each.

    Args:
        requests: Complete requests; their negative prompts count where guidance reads them.
    """
    if torch.device(pipe.device).type == "meta":  # of a plan, whose tokenizers are blank
        return
    seen = set()
    for request in requests:
        guided = request["cfg_scale"] != 1
        for text in (request["prompt"], request.get("negative_prompt") if guided else None):
            if text and text not in seen:
                seen.add(text)
                _warn_of(pipe, text, request)


def _warn_of(pipe: "BasePipeline", text: str, request: Mapping[str, Any]) -> None:
    for name, most in pipe.prompt_limits().items():
        remedy = ""
        if name == pipe.prompt_tokenizer and (key := length_key(pipe)):
            most += request[LENGTH] - pipe.call_defaults[LENGTH]
            remedy = f" Set {key} higher, or shorten the prompt."
        ids = pipe.prompt_tokens(name, text)
        if len(ids) > most:
            message = "The prompt %r has %d tokens for %s, and its text encoder reads %d: %r is not read.%s"
            logger.warning(message, _start(text), len(ids), name, most, _rest(pipe, name, ids[most:]), remedy)


def _start(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _rest(pipe: "BasePipeline", name: str, ids: Sequence[int]) -> str:
    return _start(getattr(pipe, name).decode(ids, skip_special_tokens=True).strip())
