"""Which model of `conf/model/` the weights of a command of DiffSynth-Studio belong to.

A model is known as soon as its YAML file is there. `LACKING` only gives families without one a name.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..config.nodes import locate

# Families of DiffSynth-Studio that have no file in conf/model/ yet, by patterns of their repositories' names.
LACKING = {
    "Wan-AI/*": "Wan",
    "PAI/Wan*": "Wan-Fun",
    "iic/VACE-Wan*": "Wan VACE",
}
# Endings of the repositories that hold a model in diffusers' layout, where DiffSynth-Studio reads the original one.
LAYOUTS = ("", "-Diffusers", "-diffusers")
# Repositories of which only a later release has that layout, by the name of that release.
RELEASES = {"circlestone-labs/Anima": "circlestone-labs/Anima-Base-v1.0-Diffusers"}
# Folders of diffusers' layout that are named as the components are.
FOLDERS = r"(text_encoder(_\d)?|vae|image_encoder|siglip|controlnet)/"
# What the names of a component's files contain elsewhere, in the order in which they are looked for.
COMPONENTS = {
    "controlnet": "controlnet",
    "text_encoder": "text_encoder|t5|qwen3|mistral",
    "vae": r"vae|\bae\.",
    "image_encoder": "clip|image_encoder",
    "dit": "",
}


# Parts of a network that DiffSynth-Studio treats as a model of its own: the network, and how its layers' names begin.
PARTS = {"vace": ("dit", "vace_")}


class Files(NamedTuple):
    """Files of one network, as `--model_id_with_origin_paths` names them: `owner/name:pattern`."""

    model_id: str
    pattern: str

    @property
    def expert(self) -> str:
        """Which of two experts the files hold, `high` or `low`; empty if the model has one network."""
        found = re.match(r"(high|low)_noise_model/", self.pattern)
        return found[1] if found else ""

    @property
    def component(self) -> str:
        """The component that the files hold, by their names; each of two experts is `dit`."""
        if folder := re.match(FOLDERS, self.pattern):
            return folder[1]
        name = f"{self.model_id if 'controlnet' in self.model_id.lower() else ''}:{self.pattern}".lower()
        return next(component for component, words in COMPONENTS.items() if re.search(words, name))


def files_of(value: str) -> list[Files]:
    """The files in a value of `--model_id_with_origin_paths`; each entry is cut at its last colon."""
    entries = [entry.strip().rpartition(":") for entry in value.split(",") if entry.strip()]
    return [Files(model_id, pattern) for model_id, _, pattern in entries]


def paths_of(value: str) -> list[str | list[str]]:
    """The entries of `--model_paths`: a file, or a list of one network's shards.

    Raises:
        ValueError: It is no JSON list.
    """
    try:
        paths = json.loads(value)
    except ValueError:
        paths = None
    if not isinstance(paths, list) or not all(paths):
        raise ValueError(f"--model_paths is {value[:60]!r}; expected a JSON list, such as '[\"dit.safetensors\"]'.")
    return paths


def local_files_of(value: str, models: Iterable["Model"]) -> list[Files]:
    """The entries of `--model_paths` as the hub's files, where a path has a known repository's name in it."""
    known = {part["model_id"] for model in models for part in model.components.values() if "model_id" in part}
    firsts = [each if isinstance(each, str) else each[0] for each in paths_of(value)]
    cut = [(model_id, first.partition(f"{model_id}/")[2]) for first in firsts for model_id in known]
    return [Files(model_id, pattern) for model_id, pattern in cut if pattern]


def component_of_path(path: str | list[str]) -> str:
    """The component that a local file, or a list of shards, holds."""
    first = path if isinstance(path, str) else path[0]
    return Files("", "/".join(Path(first).parts[-2:])).component


@dataclass(frozen=True)
class Model:
    """A model of `conf/model/`.

    Args:
        name: Its option.
        node: Its file, with those that it inherits from.
        has_their_files: Whether it reads the files that DiffSynth-Studio reads, not diffusers' layout of them.
    """

    name: str
    node: Mapping[str, Any]
    has_their_files: bool = True

    @property
    def components(self) -> dict[str, Mapping[str, str]]:
        """Where the files of its networks, tokenizer and processor are, by component."""
        parts = {name: part for name, part in self.node.items() if isinstance(part, Mapping)}
        return {name: part for name, part in parts.items() if part.keys() & {"model_id", "path"}}

    @property
    def networks(self) -> list[str]:
        """Its components with weights; the files of the others are a folder."""
        return [
            name for name, part in self.components.items() if not str(part.get("origin_file_pattern")).endswith("/")
        ]

    @property
    def makes_videos(self) -> bool:
        """Whether the samples of its trainings are videos."""
        return "video" in self.node.get("training", {}).get("data_file_keys", ())

    def default_targets(self, component: str) -> Any:
        """The layers of a component that get an adapter if no others are named."""
        every = self.node.get("training", {}).get("lora_target_modules", {})
        found = every.get(component)
        same = re.fullmatch(r"\$\{\.(\w+)\}", found) if isinstance(found, str) else None  # those of another component
        return every.get(same[1]) if same else found

    def parts(self, name: str) -> list[str]:
        """The names of what is trained in full of a part in `PARTS`; empty if the model has no such part."""
        network, start = PARTS.get(name, ("", ""))
        full = self.node.get("training", {}).get("full_models", ())
        return [each for each in full if start and each.startswith(f"{network}.{start}")]

    @cached_property
    def pipeline(self) -> Any:
        """The class of its pipeline; it imports torch."""
        return locate(self.node["_target_"], "model").__self__


def known_models(conf: Path) -> Iterator[Model]:
    """The models of a folder `conf`, without the embedded ones, whose transformers are in no repository."""
    for file in sorted((conf / "model").glob("[!_]*.yaml")):
        model = Model(file.stem, _merged(file))
        if "model_id" in model.components.get("dit", {}):
            yield model


def _merged(file: Path) -> dict[str, Any]:
    """A model's file with those that it inherits from, without the keys that every model shares."""
    node = yaml.safe_load(file.read_text(encoding="utf-8"))
    whole: dict[str, Any] = {}
    for parent in node.pop("defaults", []):
        if isinstance(parent, str) and not parent.startswith("_"):
            whole = _with(whole, _merged(file.with_stem(parent)))
    return _with(whole, node)


def _with(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    in_both = [key for key in upper if isinstance(upper[key], Mapping) and isinstance(lower.get(key), Mapping)]
    return {**lower, **upper, **{key: _with(lower[key], upper[key]) for key in in_both}}


def find_model(files: Iterable[Files], models: Iterable[Model]) -> Model:
    """The model that files belong to, by the repository of its transformer, else by those of all of them.

    Raises:
        LookupError: No model has them, or several do; the message says what to type.
    """
    files, models = list(files), list(models)
    transformers, wanted = [each for each in files if each.component == "dit"], {each.component for each in files}
    for model_id in [each.model_id for each in transformers]:
        for name in [*(f"{model_id}{ending}" for ending in LAYOUTS), RELEASES.get(model_id)]:
            having = [model for model in models if model.components["dit"]["model_id"] == name]
            if having:
                model = _fitting(having, wanted, models)
                return Model(model.name, model.node, has_their_files=name == model_id)
    found = [] if transformers else [model for model in models if _has(model, files)]
    if len(found) == 1:
        return found[0]
    raise LookupError(_what_is_lacking(transformers or files, found, models))


def _fitting(having: list[Model], wanted: set[str], models: Iterable[Model]) -> Model:
    """The smallest of the models with a transformer that has the wanted networks, else one with the same pipeline.

    The second case is a transformer for which no file has a ControlNet; the command names its repository.
    """
    alike = [each for each in models if each.node["_target_"] == having[0].node["_target_"]]
    fitting = next(
        filter(None, ([m for m in some if wanted <= m.components.keys()] for some in (having, alike))), having
    )
    return min(fitting, key=lambda each: len(each.components)) if fitting is not having else having[0]


def _has(model: Model, files: Iterable[Files]) -> bool:
    places = {(name, part.get("model_id")) for name, part in model.components.items()}
    return all((each.component, each.model_id) in places for each in files)


def _what_is_lacking(files: list[Files], found: list[Model], models: list[Model]) -> str:
    names = ", ".join(dict.fromkeys(each.model_id for each in files))
    if not files:
        return "the file names no weights of a hub; type the model behind it, such as model=qwen_image"
    if found:
        return f"{names}: {', '.join(model.name for model in found)} have these files; type one of them, model=…"
    patterns = [pattern for pattern in LACKING if fnmatchcase(files[0].model_id, pattern)]
    near = [m.name for m in models if any(fnmatchcase(m.components["dit"]["model_id"], each) for each in patterns)]
    what = f"the family {LACKING[patterns[0]]}" if patterns and not near else "this model"
    others = " or ".join(near) if near else "a model that is there"
    return f"{names}: {what} has no file in conf/model/ yet; if the weights fit {others}, type it, model=…"
