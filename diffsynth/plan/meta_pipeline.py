"""Builds a pipeline on the meta device: models that have their architecture but no weights.

Architectures come from a model's own config.json; those of released models are in this package.
"""

import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import torch
from torch import nn
from transformers import BatchEncoding

from ..core.loader import ModelConfig, read_object
from ..diffusion.architectures import architectures, names, released_config
from ..diffusion.base_pipeline import BasePipeline
from ..diffusion.pipeline.components import Folder, Network

IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "mm_token_type_ids")  # of transformers' vision-language models


@dataclass(frozen=True)
class Architecture:
    """A model's config.json, as a path or as its content; takes the place of a `ModelConfig` but has no weights."""

    config: Path | Mapping

    def check_path(self, name: str, made_by: str = "") -> None:
        """Accept everything, because there are no files."""

    def resolve(self) -> None:
        """Return no files, because there are no weights."""


class BlankTokenizer:
    """Returns zeros (B, L) as the token ids of any texts.

    L is the length to which prompts are padded, or else `tokens` and the tokens of images, which are the special tokens
    that follow themselves.

    Args:
        tokens: Number of tokens of every prompt.
    """

    IMAGE_TOKENS = re.compile(r"(<\|\w+\|>)\1+")

    def __init__(self, tokens: int):
        self.tokens = tokens

    def __call__(
        self, texts: Sequence[str], max_length: int | None = None, padding: str | None = None, **_
    ) -> BatchEncoding:
        images = sum(len(run[0]) // len(run[1]) for run in self.IMAGE_TOKENS.finditer(texts[0]))
        length = max_length if padding == "max_length" else self.tokens + images
        ids = torch.zeros(len(texts), length, dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def apply_chat_template(self, *_, **__) -> str:
        return ""

    def convert_tokens_to_ids(self, token: str) -> int:
        return 0


def meta_pipeline(model: Callable[..., BasePipeline], tokens: int) -> BasePipeline:
    """Build the pipeline of `model` on the meta device, without weights, with a blank tokenizer.

    An image processor that is not on disk has the defaults of its library, which the released models use.

    Args:
        model: A partial of a family's `from_components`, as the configuration builds it.
        tokens: Number of tokens of every prompt, unless the family pads prompts to a length of its own.

    Raises:
        FileNotFoundError: The architecture of a model is neither on disk, nor in this package, nor downloadable.
    """
    parts = _parts(model)
    networks, given = model.func.__self__.networks(), _networks(model)
    for name, part in given.items():
        part.check_path(name, networks[name].made_by)
    found = {name: find_config(part, networks[name], name, given.values()) for name, part in given.items()}
    architectures_of = {name: Architecture(config) for name, config in found.items()}
    folders = {n: part for n, part in model.func.__self__.components.items() if isinstance(part, Folder)}
    tokenizers = {name: folder.needed_by for name, folder in folders.items() if not folder.is_optional}
    encoders = {name: architectures_of.pop(name) for name in tokenizers.values() if name in architectures_of}
    left_out = dict.fromkeys(parts.keys() - architectures_of.keys())
    pipe = model.func(**{**model.keywords, **left_out, **architectures_of}, device="meta")
    pipe.build_models(encoders)  # apart, because `from_components` wants their tokenizers too
    for name, encoder in tokenizers.items():
        if encoder in encoders:
            setattr(pipe, name, BlankTokenizer(tokens))
            read_images_as_text(getattr(pipe, encoder))
    for name, part in parts.items():
        if name in folders and folders[name].is_optional:
            (folder,) = [None] if part.is_absent else part.resolve()
            setattr(pipe, name, folders[name].read(folder))
    pipe.add_units()
    return pipe


def read_images_as_text(text_encoder: nn.Module) -> None:
    """Make a vision-language model read image tokens as text, because their positions would depend on values.

    So the activations of its vision tower are not counted; its weights are.
    """
    for module in text_encoder.modules():
        if "pixel_values" in inspect.signature(module.forward).parameters:
            module.register_forward_pre_hook(_without_images, with_kwargs=True)


def _without_images(_: nn.Module, args: tuple, inputs: dict) -> tuple[tuple, dict]:
    return args, {name: value for name, value in inputs.items() if name not in IMAGE_INPUTS}


def _parts(model: Callable[..., BasePipeline]) -> dict[str, ModelConfig]:
    """The files of each component by its name."""
    return {name: part for name, part in model.keywords.items() if isinstance(part, ModelConfig)}


def _networks(model: Callable[..., BasePipeline]) -> dict[str, ModelConfig]:
    """Those of networks: tokenizers and processors have no architecture."""
    networks = model.func.__self__.networks()  # `model.func` is a class method of the family
    return {name: part for name, part in _parts(model).items() if name in networks}


def find_config(part: ModelConfig, network: Network, name: str, parts: Collection[ModelConfig]) -> Path | Mapping:
    """Return a model's config.json or its content, from beside its weights, from this package, or from the hub.

    Args:
        name: Name of the network in the pipeline.
        parts: Where the networks of the model are.
    """
    name = network.lora.prefix if network.lora else name
    if part.config is not None:
        return architectures().get(part.config, {}).get(name) or Path(part.config)
    folder = _folder(part)
    if (folder / "config.json").exists() and (
        not network.layouts or names(read_object(folder / "config.json"), network)
    ):
        return folder
    component = "" if part.path else str(PurePosixPath(str(part.origin_file_pattern)).parent)
    known = architectures().get(part.model_id, {}).get(component)
    if network.layouts and component != name:  # the layout of the authors has no such folder
        known = released_config(name, [part, *parts])
    if part.path is not None:
        return known or folder
    return known or replace(part, origin_file_pattern=f"{component}/config.json").resolve()[0]


def _folder(part: ModelConfig) -> Path:
    """The folder of a model's weights."""
    if part.path is None:
        return part.folder / PurePosixPath(str(part.origin_file_pattern)).parent
    first = Path(part.path if isinstance(part.path, str) else part.path[0])
    return first if first.is_dir() else first.parent


def needs_download(model: Callable[..., BasePipeline]) -> bool:
    """Whether weights of `model` have to be downloaded."""
    return any(part.is_to_be_downloaded for part in _parts(model).values())


def download_bytes(pipe: BasePipeline, model: Callable[..., BasePipeline]) -> int:
    """Return the bytes that have to be downloaded, at two bytes per parameter (released weights are bf16)."""
    absent = [getattr(pipe, name) for name, part in _networks(model).items() if part.is_absent]
    stored = [p for model in absent for name, p in model.named_parameters() if name not in tied(model)]
    return sum(2 * parameter.numel() for parameter in stored)


def tied(model: nn.Module) -> Collection[str]:
    """Return the names of parameters that are tied to others, so that weight files do not have them."""
    return getattr(model, "all_tied_weights_keys", {})


def file_bytes(part: ModelConfig) -> int | None:
    """Return the bytes of a model's files; None if they have to be downloaded."""
    if part.is_absent:
        return None
    named = part.path if isinstance(part.path, list) else [part.path or part.folder / str(part.origin_file_pattern)]
    files = [file for path in map(Path, named) for file in (path.glob("*") if path.is_dir() else [path])]
    if part.path is None:
        files = list(part.folder.glob(str(part.origin_file_pattern)))
    return sum(file.stat().st_size for file in files if file.is_file())
