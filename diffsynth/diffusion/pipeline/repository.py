"""A diffusers repository: a `model_index.json` that names the components, each in a folder beside it."""

import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...core.files import check_replaceable, mark_as_made, partial_path, replacing, replacing_folder
from ...core.loader import ModelConfig, NotInRepository, read_object

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline

INDEX = "model_index.json"


def find_index(config: ModelConfig) -> Path | None:
    """The `model_index.json` of the repository that a network's weights are from; None if it has none.

    That of a hub's repository is downloaded, with the scheduler's folder, if it is not on this machine.

    Args:
        config: Where the weights are, in a folder of the repository.

    Raises:
        FileNotFoundError: It is not on this machine, and the hub does not answer.
    """
    if config.path is None:
        try:
            (index,) = replace(config, origin_file_pattern=INDEX).resolve()
        except NotInRepository:
            return None
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error} Or set rest=none.") from error
        with suppress(FileNotFoundError):  # `check_rest` names the component that is missing
            replace(config, origin_file_pattern="scheduler/").resolve()
        return index
    index = config.resolve()[0].parent.parent / INDEX
    return index if index.is_file() else None


def component_folders(pipe: "BasePipeline", index: Path) -> dict[str, Path]:
    """The folder of each component that an index names: where the pipeline has it from, else beside the index.

    Raises:
        ValueError: The index is no JSON object.
    """
    entries = read_object(index).items()
    components = [name for name, value in entries if name.isidentifier() and _is_component(value)]
    sources = {name: Path(source["path"]) for name, source in pipe.sources().items()} | pipe.folders
    own = {pipe.lora_prefixes.get(name, name): folder for name, folder in sources.items()}
    return {name: own.get(name, index.parent / name) for name in components}


def check_rest(
    output: Path, index: Path, folders: Mapping[str, Path], inputs: Iterable[Path], how: Literal["link", "copy"]
) -> None:
    """Check that `complete` can write these components, and may.

    Raises:
        FileNotFoundError: A component is not on this machine, or has no configuration.
        ValueError: `output` has an index, a link or a folder that this program has not made, or that is read.
        OSError: The file system has no symbolic links.
    """
    _check_index(output / INDEX, index)
    for name, folder in folders.items():
        _check_component(name, folder)
        if (output / name).is_symlink():
            _check_target(output / name, folder)
        else:
            check_replaceable(output / name, inputs)
        if how == "link":
            _new_link(folder.resolve(), output / name).unlink()


def _check_index(path: Path, index: Path) -> None:
    if path.exists() and path.read_bytes() != index.read_bytes():
        raise ValueError(f"{path} would be replaced, but differs from {index}; set another output=…, or rest=none.")


def _check_component(name: str, folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing, the base's {name}; copy it there, or set rest=none.")
    if not any(folder.glob("*config.json")):  # diffusers' schedulers have a scheduler_config.json, and so on
        raise FileNotFoundError(f"{folder}, the {name}, has no config.json; copy one there, or set rest=none.")


def _check_target(link: Path, folder: Path) -> None:
    if link.resolve() != folder.resolve():
        raise ValueError(
            f"{link} would be replaced, but is a link to {link.resolve()} instead of {folder}; set another "
            "output=…, or rest=none."
        )


def complete(output: Path, index: Path, folders: Mapping[str, Path], how: Literal["link", "copy"]) -> None:
    """Write an index and the folders of components into a repository.

    Args:
        folders: The folders by the names they get.
        how: `link` makes symbolic links, `copy` copies the files.

    Raises:
        OSError: The file system has no symbolic links.
    """
    for name, folder in folders.items():
        (_link if how == "link" else _copy)(folder.resolve(), output / name)
    with replacing(output / INDEX) as partial:
        shutil.copyfile(index, partial)


def _link(folder: Path, path: Path) -> None:
    link = _new_link(folder, path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    link.replace(path)


def _new_link(folder: Path, path: Path) -> Path:
    """Make the link to a folder that `path` is to be, under a temporary name."""
    link = partial_path(path)
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(folder, target_is_directory=True)
    except OSError as error:
        raise OSError(f"{path} cannot be a link to {folder} ({error.strerror}); set rest=copy.") from error
    return link


def _copy(folder: Path, path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    with replacing_folder(path) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        mark_as_made(partial)


def _is_component(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
