"""Translates a file of DiffSynth-Studio's commands."""

from collections.abc import Sequence
from pathlib import Path

from .launch import launch_of
from .models import Files, Model, files_of, find_model, known_models, local_files_of
from .ours import OurCommand, our_command
from .parsing import Command, read_commands
from .theirs import Theirs, path

PROJECT = Path(__file__).parents[2]  # the folder of our scripts and of conf/


def translate(
    file: str | Path, model: str = "", exact: bool = False, project: Path = PROJECT
) -> list[OurCommand | str]:
    """Our commands for the trainings of a file, with the file's other commands as texts.

    Args:
        file: A shell script of DiffSynth-Studio, or the training_args.json of a run.
        model: An option of conf/model/; if empty, the one that the files of weights belong to.
        exact: Whether to imitate DiffSynth-Studio as closely as possible.
        project: The folder of our scripts and of `conf`.

    Raises:
        ValueError: The file has no such command, or there is no such model.
    """
    found = read_commands(file)
    commands = [each for each in found if isinstance(each, Command)]
    caches = [each.flags["output_path"] for each in commands if _makes_cache(each) and "output_path" in each.flags]
    cache = path(caches[0]) if len(caches) == 1 else ""
    models = list(known_models(project / "conf"))
    ours: list[OurCommand | str] = []
    for each in found:
        if isinstance(each, str):
            ours.append(each)
            continue
        launch = launch_of(each, Path(file), project)
        chosen, problem = _model(each, commands, models, model)
        theirs = Theirs(each.flags, project, chosen, launch.processes, exact, cache, tuple(models))
        ours.append(our_command(theirs, launch, problem))
    return ours


def _makes_cache(command: Command) -> bool:
    return command.flags.get("task", "").endswith(":data_process")


def _model(
    command: Command, commands: Sequence[Command], models: Sequence[Model], name: str
) -> tuple[Model | None, str]:
    """The model of a command, and why there is none; a first stage may leave the transformer to the second."""
    if name:
        return _named(name, models), ""
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
