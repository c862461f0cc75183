"""Translates a file of DiffSynth-Studio's commands."""

from collections.abc import Sequence
from pathlib import Path

from .launch import Launch, launch_of
from .models import Files, Model, files_of, find_model, known_models, local_files_of
from .ours import OurCommand, OurStatement, our_command
from .parsing import Command, read_commands
from .theirs import Theirs, path

PROJECT = Path(__file__).parents[2]  # the folder of our scripts and of conf/
NO_WEIGHTS = (
    "the command names no weights; if it is one of DiffSynth-Studio's, type the model behind the file, such as "
    "model=qwen_image"
)


def translate(file: str | Path, model: str = "", exact: bool = False, project: Path = PROJECT) -> list[OurStatement]:
    """Our statements for those of a file: each training is ours, the text around them is theirs.

    Args:
        file: A shell script of DiffSynth-Studio, or the training_args.json of a run.
        model: An option of conf/model/; if empty, the one that the files of weights belong to.
        exact: Whether to imitate DiffSynth-Studio as closely as possible.
        project: The folder of our scripts and of `conf`.

    Raises:
        ValueError: The file has no such command, or there is no such model.
    """
    found = read_commands(file)
    commands = [command for each in found for command in each.commands]
    caches = [each.flags["output_path"] for each in commands if _makes_cache(each) and "output_path" in each.flags]
    cache = path(caches[0]) if len(caches) == 1 else ""
    models = list(known_models(project / "conf"))

    def ours(each: Command) -> OurCommand:
        launch, problem = _launch(each, Path(file), project)
        chosen, no_model = _model(each, commands, models, model)
        theirs = Theirs(
            each.flags, project, chosen, launch.processes, exact, cache, tuple(models), each.variables, each.folder
        )
        return our_command(theirs, launch, problem or no_model)

    return [
        OurStatement([ours(part) if isinstance(part, Command) else part for part in each.parts], each.problem)
        for each in found
    ]


def _launch(command: Command, file: Path, project: Path) -> tuple[Launch, str]:
    """How our command starts, and why it cannot; one mistaken command leaves the others of the file."""
    bare = Launch(["accelerate", "launch"], 1, [])
    if command.problem:
        return bare, command.problem
    try:
        return launch_of(command, file, project), ""
    except ValueError as error:
        return bare, str(error)


def _makes_cache(command: Command) -> bool:
    return command.flags.get("task", "").endswith(":data_process")


def _model(
    command: Command, commands: Sequence[Command], models: Sequence[Model], name: str
) -> tuple[Model | None, str]:
    """The model of a command, and why there is none; a first stage may leave the transformer to the second."""
    if name:
        return _named(name, models), ""
    if not command.flags.keys() & {"model_id_with_origin_paths", "model_paths"}:
        return None, NO_WEIGHTS
    files, others = ([file for each in some for file in _files(each, models)] for some in ([command], commands))
    has_transformer = any(file.component == "dit" for file in files)
    try:
        return find_model(files if has_transformer else others, models), ""
    except LookupError as error:
        return None, str(error)


def _named(name: str, models: Sequence[Model]) -> Model:
    found = next((model for model in models if model.name == name), None)
    if found is None:
        raise ValueError(f"model={name}: there is no such model; expected one of {', '.join(m.name for m in models)}.")
    return found


def _files(command: Command, models: Sequence[Model]) -> list[Files]:
    of_hub = files_of(command.flags.get("model_id_with_origin_paths", ""))
    return of_hub + local_files_of(command.flags.get("model_paths", "[]"), models)
