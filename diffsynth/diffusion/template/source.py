"""Where a template is: in a folder, or in a hub's repository, whose code somebody has to allow."""

import os
import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from ...core.loader import ModelConfig
from .code import CODE

COMMIT = re.compile(r"[0-9a-f]{40}")
SHOWN_LINES = 8


def find_template(config: ModelConfig) -> Path:
    """The folder of a template: a local one, whose code is run as given, or a hub's repository, downloaded.

    Raises:
        FileNotFoundError: It is neither here nor to be had.
        ValueError: It is a hub's, and nobody said that its code may run here; shows the code.
    """
    name = config.path or config.model_id
    if isinstance(name, str | os.PathLike) and Path(name).is_dir():
        return Path(name)
    if config.path is not None:
        raise FileNotFoundError(f"{name} is no folder; expected one that holds a template's {CODE}.")
    if not (config.trust_remote_code and COMMIT.fullmatch(config.revision or "")):
        raise ValueError(_what_would_run(config))
    (folder,) = _kept_in(config, config.revision, origin_file_pattern=None).resolve()
    return folder


def _kept_in(config: ModelConfig, folder: str, **options) -> ModelConfig:
    """The repository, below a folder of its own among the downloaded models: no other revision is ever there."""
    base = config.folder.parents[config.model_id.count("/")]
    return replace(config, local_model_path=str(base / folder), **options)


def _what_would_run(config: ModelConfig) -> str:
    lacking = "" if config.trust_remote_code else "trust_remote_code is false"
    if config.trust_remote_code:
        lacking = f"revision is {config.revision!r}, and no commit, so that other code may come another time"
    return (
        f"The template {config.model_id} is a hub's and brings code, which has not been run: {lacking}.\n"
        f"{_shown(config)}\nRead it. If you trust it, set trust_remote_code=true and revision= the commit that you "
        "read (40 hex digits), or put it into a folder of yours and set path=."
    )


def _shown(config: ModelConfig) -> str:
    code = _kept_in(config, f"unread/{config.revision or 'newest'}", origin_file_pattern=CODE)
    if config.revision is None:
        (code.folder / CODE).unlink(missing_ok=True)
    try:
        (file,) = code.resolve()
    except OSError as error:
        return f"It cannot be shown: {error}"
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    begin = "\n".join(f"  {line}" for line in lines[:SHOWN_LINES])
    return f"{file}, {len(lines)} lines, SHA-256 {sha256(file.read_bytes()).hexdigest()}, begins:\n{begin}\n  …"
