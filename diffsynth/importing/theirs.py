"""A command of DiffSynth-Studio with the facts that the readers of its flags ask for."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from .lines import Line
from .models import PARTS, Files, Model, component_of_path, files_of, paths_of

# Flags whose default in DiffSynth-Studio may be another than here.
DEFAULTS = {
    "dataset_repeat": "1",
    "dataset_num_workers": "0",
    "data_file_keys": "image,video",
    "max_pixels": "1048576",
    "num_frames": "81",
    "learning_rate": "0.0001",
    "weight_decay": "0.01",
    "num_epochs": "1",
    "gradient_accumulation_steps": "1",
    "lora_rank": "32",
    "lora_target_modules": "q,k,v,o,ffn.0,ffn.2",
    "remove_prefix_in_ckpt": "pipe.dit.",
    "task": "sft",
    "output_path": "./models",
    "max_timestep_boundary": "1.0",
    "min_timestep_boundary": "0.0",
}
# Those of them that no translation may leave to our defaults.
ALWAYS = ("learning_rate", "num_epochs", "gradient_accumulation_steps", "remove_prefix_in_ckpt", "max_pixels", "task")


@dataclass(frozen=True)
class Theirs:
    """One command, as the readers of its flags see it.

    Args:
        flags: Its flags.
        project: The folder of our scripts and of `conf`.
        model: The model that its weights belong to; None if there is none here.
        processes: Number of processes of the launch.
        exact: Whether to imitate DiffSynth-Studio as closely as possible.
        cache: The folder that the file's own `sft:data_process` writes; empty if there is none.
        models: All models that are known here.
        variables: Flags in whose values the shell puts another text.
        folder: The `cd …` in front of it, which is left out; empty if there is none.
    """

    flags: Mapping[str, str]
    project: Path
    model: Model | None = None
    processes: int = 1
    exact: bool = False
    cache: str = ""
    models: tuple[Model, ...] = ()
    variables: frozenset[str] = frozenset()
    folder: str = ""

    def __getitem__(self, flag: str) -> str:
        """The value of a flag, or its default; empty if it has neither."""
        return self.flags.get(flag, DEFAULTS.get(flag, ""))

    def says(self, flag: str) -> bool:
        """Whether a flag is given, with another value than its default."""
        return flag in self.flags and self.flags[flag] != DEFAULTS.get(flag)

    @property
    def stage(self) -> str:
        """`data_process`, `train`, or empty for a training in one stage."""
        return self["task"].partition(":")[2]

    @property
    def method(self) -> str:
        """The task without its stage: `sft`, `direct_distill`, …; flags of DMD2 name it, too."""
        is_dmd2 = any(flag.startswith("dmd2_") for flag in self.flags)
        return "dmd2" if is_dmd2 else self["task"].partition(":")[0]

    @property
    def trains_template(self) -> bool:
        return "template_model_id_or_path" in self.flags

    @property
    def has_lora(self) -> bool:
        return "lora_base_model" in self.flags

    @cached_property
    def files(self) -> list[Files]:
        """The hub's files that it reads."""
        return files_of(self["model_id_with_origin_paths"])

    @cached_property
    def components(self) -> set[str]:
        """The components whose weights it names, without those that it loads as empty shells."""
        paths = paths_of(self["model_paths"]) if "model_paths" in self.flags else []
        shells = {component_named(each) for each in self["offload_models"].split(",") if each}
        named = {*(each.component for each in self.files), *map(component_of_path, paths)} - shells
        return set(map(self.network, named))

    @cached_property
    def expert(self) -> str:
        """Which of the model's two experts it trains, `high` or `low`; empty for models with one network."""
        has_two = self.model is not None and "dit2" in self.model.components
        return next((each.expert for each in self.files if each.expert), "") if has_two else ""

    def network(self, name: str) -> str:
        """The network here of what DiffSynth-Studio calls a model: its `dit` is either expert."""
        name = PARTS.get(name, (name,))[0]
        return "dit2" if name == "dit" and self.expert == "low" else name


Reader = Callable[[str, Theirs], Iterable[Line]]  # of a flag's value: what it becomes here


def component_named(text: str) -> str:
    """The component that a text of `--fp8_models` or `--offload_models` means: `owner/name:pattern`, or a path."""
    return files_of(text)[0].component if ":" in text else component_of_path(text)


def whole_number(value: str, flag: str) -> int:
    """The value of a flag that counts something.

    Raises:
        ValueError: It is no whole number of at least 1.
    """
    if not (value.isdecimal() and int(value)):
        raise ValueError(f"--{flag} is {value!r}; expected a whole number of at least 1.")
    return int(value)


def path(text: str) -> str:
    """A path as it is typed here: without `./` before it, nor a slash behind it."""
    return str(PurePosixPath(text))


def listed(names: list[str]) -> str:
    """A list of names, as it is typed."""
    return f"[{','.join(names)}]"


def names_in(value: str) -> list[str]:
    """The names in a flag's value, which commas separate."""
    return [name.strip() for name in value.split(",") if name.strip()]
