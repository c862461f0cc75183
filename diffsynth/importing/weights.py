"""Readers of the flags about weights: which files, and in which format they are held."""

import re
from collections.abc import Iterator
from pathlib import Path

from ..core.json_text import parse_object
from ..core.loader.model_config import PICKLE_SUFFIXES
from .lines import Differs, LeftOut, Line, Refused, Set
from .models import RELEASES, Files, component_of_path, paths_of
from .theirs import Reader, Theirs, component_named, listed, names_in, path

# Values of memory.storage, by what the names of their methods contain.
STORAGES = {"nf4": "nf4", "int8": "int8", "fp8": "fp8"}
BACKENDS = "bitsandbytes", "torchao"  # their methods that memory.storage has, too


def hub_files(value: str, theirs: Theirs) -> Iterator[Line]:
    if theirs.model is None:
        return
    if theirs.expert:
        yield Set("expert", theirs.expert)
    transformer = next((each.model_id for each in theirs.files if each.component == "dit"), "")
    if not theirs.model.has_their_files:
        where = theirs.model.components["dit"]["model_id"]
        what = "of another release" if transformer in RELEASES else "the same values"
        yield Differs(f"The weights are those of {where}: {what} under diffusers' names.")
        if "text_conditioner" in theirs.model.components:
            yield Differs("Their dit holds the text_conditioner, which is trained with it; here type it beside dit.")
        yield from _absent(theirs)
        return
    if transformer not in ("", theirs.model.components["dit"]["model_id"]):
        yield Differs(
            f"{transformer} is read by model={theirs.model.name}, whose steps and guidance validation and generate.py "
            "take."
        )
    read = theirs.components if theirs.stage == "train" else {each.component for each in theirs.files}
    for files in [each for each in theirs.files if each.component in read]:
        yield from _of_component(theirs, files.component, files)
    yield from _absent(theirs)


def _of_component(theirs: Theirs, component: str, files: Files) -> Iterator[Line]:
    text = f"{files.model_id}:{files.pattern}"
    if component not in theirs.model.components:
        yield Refused(f"{text}: {theirs.model.name} has no component {component} yet; take it out of the command")
        return
    pattern = _pattern_here(theirs, component, files)
    if "path" in theirs.model.components[component]:
        yield Set(f"model.{component}.path", "null")  # it would be read instead
    yield Set(f"model.{component}.model_id", files.model_id)
    yield Set(f"model.{component}.origin_file_pattern", pattern)
    if pattern.rpartition("/")[0] != files.pattern.rpartition("/")[0]:
        yield Differs(f"{text} is read as {pattern}: the same weights, as diffusers stores them.")
    elif "/" not in pattern:
        yield Differs(f"{text} needs a config.json beside it, or model.{component}.config=… with the folder of one.")


def _pattern_here(theirs: Theirs, component: str, files: Files) -> str:
    """The files of a repository that a model here reads, which may have another layout; else theirs."""
    parts = [model.components.get(component, {}) for model in (theirs.model, *theirs.models)]
    found = [part.get("origin_file_pattern") for part in parts if part.get("model_id") == files.model_id]
    return next(filter(None, found), files.pattern)


def _absent(theirs: Theirs) -> Iterator[Line]:
    """The networks that a training on a cache does without."""
    if theirs.stage == "train":
        for component in sorted({*theirs.model.networks} - theirs.components):
            yield Set(f"model.{component}", "null")


def local_files(value: str, theirs: Theirs) -> Iterator[Line]:
    for each in paths_of(value):
        paths = [each] if isinstance(each, str) else each
        component = theirs.network(component_of_path(each))
        if pickles := [name for name in paths if Path(name).suffix in PICKLE_SUFFIXES]:
            yield Refused(
                f"{pickles[0]} is a pickle, which is never loaded; convert it to .safetensors and type its path"
            )
            continue
        if theirs.model and component not in theirs.model.components:
            yield Refused(f"{paths[0]}: {theirs.model.name} has no component {component} yet; take it out")
            continue
        yield Set(f"model.{component}.path", path(paths[0]) if len(paths) == 1 else listed([*map(path, paths)]))
    if theirs.model:
        yield from _absent(theirs)


def folder_of(component: str) -> Reader:
    """The reader of a flag that names the files of a tokenizer or processor, by the hub's names or by a path."""

    def read(value: str, theirs: Theirs) -> Iterator[Line]:
        if theirs.model and component not in theirs.model.components:
            yield LeftOut(f"{theirs.model.name} needs no {component}")
            return
        if theirs.model and not theirs.model.has_their_files and ":" in value:
            yield LeftOut(f"{theirs.model.name} has its own {component}, in the repository of its weights")
            return
        model_id, _, pattern = value.rpartition(":")
        if model_id:
            yield Set(f"model.{component}.model_id", model_id)
            yield Set(f"model.{component}.origin_file_pattern", pattern)
        else:
            yield Set(f"model.{component}.path", path(value))

    return read


def resume(value: str, theirs: Theirs) -> Iterator[Line]:
    component = names_in(theirs["trainable_models"] or theirs["lora_base_model"] or "dit")[0].partition(".")[0]
    yield Set(f"model.{component}.path", path(value))
    yield Differs(
        f"{path(value)} needs a config.json beside it, or model.{component}.config=… with the folder of one. A run of "
        "this trainer that was stopped needs no such file: the same command goes on."
    )


def fp8_models(value: str, theirs: Theirs) -> Iterator[Line]:
    if theirs.stage == "data_process":
        yield LeftOut("make_cache.py loads the networks of one unit at a time")
        return
    yield from _stored("fp8", [component_named(each) for each in names_in(value)], theirs)


def _stored(storage: str, components: list[str], theirs: Theirs) -> Iterator[Line]:
    """The lines that hold some components in a format; convolutions have none."""
    absent = {"vae"} | ({*theirs.model.networks} - theirs.components if theirs.model else set())
    kept = [component for component in dict.fromkeys(components) if component not in absent]
    if "vae" in components:
        yield LeftOut("of the vae: only linear layers in blocks have 8 or 4 bits here, and it has none")
    if kept:
        yield from [Set("memory.storage", storage), Set("memory.stored", listed(kept))]


def quant_options(value: str, theirs: Theirs) -> Iterator[Line]:
    methods = dict(_methods(value))
    storages = {_storage(method) for method in methods.values()}
    if any("/" in method for method in methods.values()):
        yield LeftOut("of its excluded layers: every linear layer in the blocks is stored so")
    if None in storages or len(storages) > 1 or "fp8_models" in theirs.flags:
        found = ", ".join(dict.fromkeys(methods.values()))
        yield Refused(
            f"a run holds its frozen weights in one format, and method {found} is unsupported or mixes formats; type "
            "memory.storage=nf4, int8 or fp8 and memory.stored=[…]"
        )
        return
    yield from _stored(storages.pop(), [component_named(name) for name in methods], theirs)


def _methods(value: str) -> Iterator[tuple[str, str]]:
    """The method of each model in a value of `--quant_options`: `model:method/excluded;…`, or JSON."""
    if value.lstrip().startswith("{"):
        for model, options in parse_object(value, "--quant_options").items():
            yield model, str(options.get("method") if isinstance(options, dict) else options)
        return
    for entry in filter(None, value.split(";")):
        model, _, method = entry.rpartition(":")
        yield model.strip(), method.strip()


def _storage(method: str) -> str | None:
    known = re.match("|".join(BACKENDS), method)
    return next((ours for theirs, ours in STORAGES.items() if known and theirs in method), None)
