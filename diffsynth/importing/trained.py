"""Readers of the flags about what is trained, how, and what is saved of it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

import yaml

from .lines import Differs, Impossible, LeftOut, Line, Refused, Set
from .models import PARTS
from .theirs import Theirs, listed, names_in, path, whole_number


def trainable_models(value: str, theirs: Theirs) -> Iterator[Line]:
    names = names_in(value)
    if theirs.trains_template:
        yield Set("task.trainable_models", listed(names))
        return
    if theirs.model is not None:
        names = [part for name in names for part in theirs.model.parts(name) or [_here(name, theirs)]]
    known = theirs.model.networks if theirs.model else [name.partition(".")[0] for name in names]
    kept = [name for name in names if name.partition(".")[0] in known]
    for name in [name for name in names if name not in kept]:
        why = f"{theirs.model.name} has no component {name} to train yet; train one of {', '.join(known)}"
        yield Refused(why) if kept or theirs.has_lora else Impossible(why)
    if not theirs.has_lora:
        yield Set("lora", "none")
    if kept:
        yield Set("task.trainable_models", listed(kept))


def _here(name: str, theirs: Theirs) -> str:
    """A network's name, or a part's, with the network's name here."""
    root, dot, rest = name.partition(".")
    return name if root in PARTS else f"{theirs.network(root)}{dot}{rest}"


def lora_models(value: str, theirs: Theirs) -> Iterator[Line]:
    yield Set("lora.models", listed([theirs.network(name) for name in names_in(value)]))


def lora_targets(value: str, theirs: Theirs) -> Iterator[Line]:
    """The layers by their names here; nothing for those that the model has by default."""
    if not theirs.has_lora or not theirs.says("lora_target_modules"):
        return
    base, targets = names_in(theirs["lora_base_model"])[0], names_in(value)
    component = theirs.network(base)
    if not targets:
        yield Set("lora.target_modules", "all-linear")
        yield Differs(
            "An empty --lora_target_modules means wide linear layers of blocks there, and all linear ones here."
        )
        return
    if theirs.model is None:
        yield Set("lora.target_modules", _typed(targets))
        return
    default, original = theirs.model.default_targets(component), _original_names(theirs, component, base)
    names = _with_whole_blocks(targets, default, _numbers_of_blocks(theirs, component))
    words = list(dict.fromkeys(word for name in names for word in _names_here(name, original)))
    by_default = {_expression(layer) for layer in _layers(original) if _ends_in(layer, default)}
    if set(words) not in (set(default or ()), by_default):
        yield Set("lora.target_modules", _typed(words))


def _typed(targets: list[str]) -> str:
    """Targets as they are typed: one alone is a regular expression, there and here."""
    return targets[0] if len(targets) == 1 else listed(targets)


def _numbers_of_blocks(theirs: Theirs, component: str) -> list[int]:
    """How many blocks each list of a released network has; empty for a network that is not known."""
    from ..diffusion.architectures import architectures  # it imports torch

    part = theirs.model.components.get(component, {})
    folder = str(PurePosixPath(part.get("origin_file_pattern", "")).parent)
    config: Mapping = architectures().get(part.get("model_id"), {}).get(folder, {})
    return [value for key, value in config.items() if key.startswith("num_") and key.endswith("layers")]


def _with_whole_blocks(targets: list[str], default: Sequence[str] | None, counts: Sequence[int]) -> list[str]:
    """Targets in which the default's name of a layer stands for the full names of this layer in every block."""
    by_pattern: dict[str, list[str]] = {}
    for name in targets:
        by_pattern.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), []).append(name)
    found = []
    for pattern, names in by_pattern.items():
        ends = [end for end in default or () if isinstance(default, list) and f".{pattern}".endswith(f".{end}")]
        every = "*" in pattern and len(names) in counts and names[-1] == pattern.replace("*", str(len(names) - 1))
        found += ends[:1] if every and ends else names
    return found


def _original_names(theirs: Theirs, component: str, base: str) -> Mapping[str, str | tuple[str, ...]]:
    """A network's layers by their names in the model's original code, as its family's `LayerNames` has them.

    Args:
        base: What DiffSynth-Studio calls the network, or a part of it, whose layers alone are returned.
    """
    network = theirs.model.pipeline.components.get(component)
    original: Mapping = getattr(getattr(network, "lora", None), "original", {})
    starts = tuple(start for _, start in PARTS.values())
    if base in PARTS:
        return {name: layers for name, layers in original.items() if name.startswith(PARTS[base][1])}
    return {name: layers for name, layers in original.items() if not name.startswith(starts)}


def _names_here(target: str, original: Mapping[str, str | tuple[str, ...]]) -> list[str]:
    """What to type for the layers that the original code calls by a name; the name itself if it calls none so."""
    found = {name: layers for name, layers in original.items() if f".{name}".endswith(f".{target}")}
    return [_expression(layer) for layer in _layers(found)] or [target]


def _layers(original: Mapping[str, str | tuple[str, ...]]) -> list[str]:
    return [layer for ours in original.values() for layer in ((ours,) if isinstance(ours, str) else ours)]


def _expression(layer: str) -> str:
    """The regular expression over the full names of a layer in every block."""
    return re.escape(layer).replace(r"\*", r"\d+")


def _ends_in(layer: str, default: Sequence[str] | None) -> bool:
    if isinstance(default, str):
        return re.fullmatch(default, layer.replace("*", "0")) is not None
    return isinstance(default, list) and any(f".{layer}".endswith(f".{end}") for end in default)


def optimizer(value: str, theirs: Theirs) -> Iterator[Line]:
    files = theirs.project.glob("conf/optimizer/*.yaml")
    options = {yaml.safe_load(file.read_text(encoding="utf-8"))["_target_"]: file.stem for file in files}
    if value in options:
        yield Set("optimizer", options[value])
    else:
        yield Refused(f"no option of optimizer is {value}; write a file conf/optimizer/mine.yaml, type optimizer=mine")


def accumulation(value: str, theirs: Theirs) -> Iterator[Line]:
    yield Set("batch_size", str(whole_number(value, "gradient_accumulation_steps") * theirs.processes))
    yield Set("micro_batch_size", "1")
    if theirs.processes == 1:
        yield Differs(
            f"batch_size={value} is theirs on one device. On N devices theirs has N times as many samples per step, "
            f"whatever the command says: type batch_size={'N' if value == '1' else f'{value} × N'}."
        )


def epochs(value: str, theirs: Theirs) -> Iterator[Line]:
    yield from [Set("max_steps", "null"), Set("num_epochs", value)]


def save_steps(value: str, theirs: Theirs) -> Iterator[Line]:
    steps = whole_number(value, "save_steps")
    accumulated = whole_number(theirs["gradient_accumulation_steps"], "gradient_accumulation_steps")
    yield Set("export.save_steps", str(max(steps // accumulated, 1)))
    if accumulated > 1:
        yield Differs(
            f"--save_steps {steps} counts micro-batches, {accumulated} of which are an optimizer step; ours counts the "
            "optimizer steps."
        )


def output_path(value: str, theirs: Theirs) -> Iterator[Line]:
    if theirs.stage == "data_process":
        yield Set("path", path(value))
        return
    if not theirs.says("output_path"):
        return
    folder = PurePosixPath(value)
    yield from [Set("output_root", str(folder.parent)), Set("name", folder.name)]
    yield Differs(f"The run's folder is {path(value)}-<signature>, and the weights are in its folder weights.")


def prefix(value: str, theirs: Theirs) -> Iterator[Line]:
    if theirs.trains_template:
        yield LeftOut("a template's file has its own names")
    elif theirs.has_lora and "trainable_models" not in theirs.flags:
        yield Set("export.formats", "[diffsynth]")
    elif value == f"pipe.{theirs['trainable_models']}." and theirs["trainable_models"] in ("dit", *PARTS):
        yield LeftOut("a network's file has the names of its released checkpoint")
        yield from _original_names_of_export(theirs)
    else:
        yield Set("export.remove_prefix_in_ckpt", value)


def _original_names_of_export(theirs: Theirs) -> Iterator[Line]:
    """How trained weights get the original's names, where the model's own files have diffusers'."""
    if theirs.model is None or theirs.model.has_their_files:
        return
    key = f"model.{theirs.network('dit')}"
    for files in [each for each in theirs.files if each.component == "dit"]:
        yield Differs(
            f"The trained weights have diffusers' names. To write the names that they had, read those files: type "
            f"{key}.model_id={files.model_id} '{key}.origin_file_pattern=\"{files.pattern}\"'."
        )


def aligned(value: str, theirs: Theirs) -> Iterator[Line]:
    yield Set("export.formats", "[common]")


def checkpointing(value: str, theirs: Theirs) -> Iterator[Line]:
    yield Set("memory.checkpointing", "blocks")


def offloading(value: str, theirs: Theirs) -> Iterator[Line]:
    yield from [Set("memory.checkpointing", "blocks"), Set("memory.offload_activations", "true")]


def streaming(value: str, theirs: Theirs) -> Iterator[Line]:
    if not theirs.has_lora:
        yield Refused("blocks that are trained in full do not stream; conf/accelerate/zero3_offload.yaml offloads them")
        return
    blocks = sum(_numbers_of_blocks(theirs, "dit")) if theirs.model else 0
    yield Set("memory", "streaming")
    if blocks:
        yield Set("memory.stream_blocks", str(blocks // 2))
