"""Models without weights: where the architecture is known, so is what a run of it takes."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath

import torch

from ..core.loader import ModelConfig
from ..diffusion.base_pipeline import BasePipeline

ARCHITECTURES = Path(__file__).parent / "architectures"  # of released models, so that a plan needs no network


@dataclass(frozen=True)
class Architecture:
    """Stands where a `ModelConfig` does: a config.json, or its content, and no files."""

    config: Path | Mapping

    def resolve(self) -> None:
        """There are no files."""


class BlankTokenizer:
    """Tokens of no text: `tokens` of them, or as many as a prompt is padded to."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def __call__(self, texts: Sequence[str], max_length: int | None = None, padding: str | None = None, **_) -> dict:
        length = max_length if padding == "max_length" else self.tokens
        ids = torch.zeros(len(texts), length, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def apply_chat_template(self, *_, **__) -> str:
        return ""


def meta_pipeline(model: Callable[..., BasePipeline], tokens: int) -> BasePipeline:
    """The pipeline that `model` would build, no weight and no tokenizer read, whose prompts are `tokens` long.

    Args:
        model: A pipeline's `from_components` with its arguments, as the configuration builds it.

    Raises:
        FileNotFoundError: The architecture of a model is neither here nor known.
    """
    parts = {name: part for name, part in model.keywords.items() if isinstance(part, ModelConfig)}
    architectures_of = {name: Architecture(find_config(part)) for name, part in parts.items() if not is_folder(part)}
    text_encoder = architectures_of.pop("text_encoder", None)
    left_out = dict.fromkeys(parts.keys() - architectures_of.keys())
    pipe = model.func(**{**model.keywords, **left_out, **architectures_of}, device="meta")
    if text_encoder is not None:  # apart, since it has no tokenizer
        pipe.build_models([text_encoder])
        pipe.tokenizer = BlankTokenizer(tokens)
    return pipe


def is_folder(part: ModelConfig) -> bool:
    """Whether this is a tokenizer's or a processor's, not weights."""
    if part.path is not None:
        return (Path(str(part.path)) / "tokenizer_config.json").exists()
    return str(part.origin_file_pattern or "").endswith("/")


def find_config(part: ModelConfig) -> Path | Mapping:
    """The config.json of a model, or its content: beside its weights, else ours of the release, else the hub's."""
    if part.config is not None:
        return Path(part.config)
    if part.path is not None:
        first = Path(part.path if isinstance(part.path, str) else part.path[0])
        return first if first.is_dir() else first.parent
    component = str(PurePosixPath(str(part.origin_file_pattern)).parent)
    if (part.folder / component / "config.json").exists():
        return part.folder / component
    known = architectures().get(part.model_id, {}).get(component)
    return known or replace(part, origin_file_pattern=f"{component}/config.json").resolve()[0]


@cache
def architectures() -> dict[str, dict[str, Mapping]]:
    """Configurations by component of each repository that is known."""
    families = [json.loads(file.read_text()) for file in sorted(ARCHITECTURES.glob("*.json"))]
    return {repository: family["components"] for family in families for repository in family["repositories"]}


def needs_download(model: Callable[..., BasePipeline]) -> bool:
    """Whether weights of `model` come from a hub first."""
    return any(part.is_to_be_downloaded for part in model.keywords.values() if isinstance(part, ModelConfig))


def download_bytes(pipe: BasePipeline, model: Callable[..., BasePipeline]) -> int:
    """What of the weights has still to be fetched; released ones have two bytes a number."""
    parts = {name: part for name, part in model.keywords.items() if isinstance(part, ModelConfig)}
    absent = [getattr(pipe, name) for name, part in parts.items() if part.is_absent and not is_folder(part)]
    stored = [p for model in absent for name, p in model.named_parameters() if name not in tied(model)]
    return sum(2 * parameter.numel() for parameter in stored)


def tied(model) -> Collection[str]:
    """Names of the parameters that are others again, and in no file."""
    return getattr(model, "all_tied_weights_keys", {})


def file_bytes(part: ModelConfig) -> int | None:
    """Bytes of a model's files; None where they are still to be fetched."""
    if part.is_absent:
        return None
    named = part.path if isinstance(part.path, list) else [part.path or part.folder / str(part.origin_file_pattern)]
    files = [file for path in map(Path, named) for file in (path.glob("*") if path.is_dir() else [path])]
    if part.path is None:
        files = list(part.folder.glob(str(part.origin_file_pattern)))
    return sum(file.stat().st_size for file in files if file.is_file())
