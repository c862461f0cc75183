"""Finds a template: in a folder, or in a hub's repository, whose code runs only if the user has allowed it."""

import os
import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from ...core.loader import ModelConfig
from .code import CODE

COMMIT = re.compile(r"[0-9a-f]{40}")
PREVIEW_LINES = 8  # lines of code that the error about untrusted code shows; a guess


def find_template(config: ModelConfig) -> Path:
    """The folder of a template: a local folder, whose code needs no permission, or a downloaded repository of a hub.

    A path is looked for here and in the folder of downloaded models. A repository that lies there needs permission, but
    no commit: its code does not change any more.

    Raises:
        FileNotFoundError: There is no such folder, or it cannot be downloaded.
        ValueError: It is a hub's, and its code has not been allowed; the message shows the beginning of the code.
    """
    name = config.path or config.model_id
    places = [Path(), config.base] if config.path or _lies_here(config) else [Path()]
    if isinstance(name, str | os.PathLike):
        for place in places:
            if (place / name).is_dir():
                return place / name
    if config.path is not None:
        raise FileNotFoundError(
            f"{name} is no folder, neither here nor in {config.base}; expected a folder that holds a template's {CODE}."
        )
    if not (config.trust_remote_code and COMMIT.fullmatch(config.revision or "")):
        raise ValueError(_not_allowed(config))
    (folder,) = _downloaded_to(config, config.revision, origin_file_pattern=None).resolve()
    return folder


def _lies_here(config: ModelConfig) -> bool:
    """Whether any commit of a repository whose code may run will do, and one was downloaded."""
    return config.trust_remote_code and config.revision is None and (config.folder / CODE).is_file()


def _downloaded_to(config: ModelConfig, folder: str, **options) -> ModelConfig:
    """The repository with a download folder of its own, so that no files of another revision are in it."""
    base = config.folder.parents[config.model_id.count("/")]
    return replace(config, local_model_path=str(base / folder), **options)


def _not_allowed(config: ModelConfig) -> str:
    reason = "trust_remote_code is false"
    if config.trust_remote_code:
        reason = f"revision is {config.revision!r}, which is no commit, so that its code may change"
    return (
        f"The template {config.model_id} comes from a hub with code, which has not been run: {reason}.\n"
        f"{_preview(config)}\nRead it. If you trust it, set trust_remote_code=true and revision= the commit that you "
        "read (40 hex digits), or put it into a folder of yours and set path=."
    )


def _preview(config: ModelConfig) -> str:
    code = _downloaded_to(config, f"unread/{config.revision or 'newest'}", origin_file_pattern=CODE)
    if config.revision is None:
        (code.folder / CODE).unlink(missing_ok=True)
    try:
        (file,) = code.resolve()
    except OSError as error:
        return f"It cannot be shown: {error}"
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    begin = "\n".join(f"  {line}" for line in lines[:PREVIEW_LINES])
    return f"{file}, {len(lines)} lines, SHA-256 {sha256(file.read_bytes()).hexdigest()}, begins:\n{begin}\n  …"
