"""Find the files of a model's weights on this machine, and download them from a hub if they are absent."""

import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..hub import answers, downloads_are_off, is_complete, locked, marked, modelscope_endpoint
from .foreign import read_object

SOURCES = ("modelscope", "huggingface")
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
SHARD = re.compile(r"[^/\\:\0]+\.\w+")  # a file in a folder
SHARD_NAME = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\..+)")
NO_SUCH_FILE = "has no such file"


class NotInRepository(FileNotFoundError):
    """The hub has answered, and its repository has no such file."""


@dataclass
class ModelConfig:
    """Where the weights of one model are: local files, or a pattern of files in a hub's repository.

    The hub is asked only for files that are absent in `<local_model_path>/<model_id>/`.

    Args:
        path: A file, a list of shards, or a folder; if given, `model_id` is not used.
        model_id: The repository, "owner/name".
        origin_file_pattern: Files of the repository, such as "transformer/*.safetensors"; a folder ends in "/"; None is
            the whole repository.
        download_source: "modelscope" or "huggingface"; None takes DIFFSYNTH_DOWNLOAD_SOURCE, then modelscope.
        local_model_path: Folder of downloaded models; None takes DIFFSYNTH_MODEL_BASE_PATH, then ./models.
        skip_download: Never ask a hub; None takes DIFFSYNTH_SKIP_DOWNLOAD, then False.
        revision: Branch, tag or commit of the repository.
        config: The config.json, or its folder, if there is none beside the weights.
        trust_remote_code: Whether Python code from the repository may run; only templates have such code.

    Raises:
        ValueError: Neither path nor model_id is given, the source is unknown, or a file is a pickle.
    """

    path: str | list[str] | None = None
    model_id: str | None = None
    origin_file_pattern: str | list[str] | None = None
    download_source: str | None = None
    local_model_path: str | None = None
    skip_download: bool | None = None
    revision: str | None = None
    config: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self):
        if self.path is None and self.model_id is None:
            raise ValueError(
                'ModelConfig needs a path or a model_id, and neither is set; set model_id="owner/name", say.'
            )
        if self.source not in SOURCES:
            raise ValueError(
                f"Unknown download source {self.source!r}; set download_source or DIFFSYNTH_DOWNLOAD_SOURCE to "
                f"{' or '.join(SOURCES)}."
            )
        for name in [*_as_list(self.path), *_as_list(self.origin_file_pattern)]:
            refuse_pickle(name)

    @property
    def source(self) -> str:
        """The name of the hub that absent files are downloaded from."""
        return self.download_source or os.environ.get("DIFFSYNTH_DOWNLOAD_SOURCE") or "modelscope"

    @property
    def folder(self) -> Path:
        """The repository's folder on this machine."""
        return self.base / self.model_id

    @property
    def base(self) -> Path:
        """The folder of downloaded models."""
        base = self.local_model_path or os.environ.get("DIFFSYNTH_MODEL_BASE_PATH") or "models"
        return Path(base).expanduser().absolute()

    @property
    def skips_download(self) -> bool:
        """Whether downloads are switched off."""
        if self.skip_download is not None:
            return self.skip_download
        return downloads_are_off()

    @property
    def is_absent(self) -> bool:
        """Whether some of the files are not on this machine."""
        return self.path is None and any(map(self._absent, _as_list(self.origin_file_pattern) or [""]))

    @property
    def is_to_be_downloaded(self) -> bool:
        """Whether `resolve` will ask a hub for files."""
        return self.is_absent and not self.skips_download

    def check_path(self, name: str, made_by: str = "") -> None:
        """Check that the path, if there is one, leads to something.

        Args:
            name: Name of the component, for the error: its key is `model.<name>`.
            made_by: Command that makes the component at `{path}`, for the error of an absent one.

        Raises:
            FileNotFoundError: It does not; the message says what to type.
        """
        absent = [path for path in _as_list(self.path) if not Path(path).exists()]
        if absent:
            start = f"make one: {made_by.format(path=absent[0])}; or " if made_by else ""
            raise FileNotFoundError(
                f"model.{name}.path: {Path(absent[0]).absolute()} does not exist; {start}set it to a .safetensors file "
                "or a folder."
            )

    def resolve(self) -> list[Path]:
        """Local paths of the files; absent files are downloaded first.

        Returns:
            The files sorted by name; for a pattern that is a folder, the folder.

        Raises:
            NotInRepository: Files are absent, here and on the hub.
            FileNotFoundError: Files are absent and could not be downloaded.
        """
        if self.path is not None:
            return [file for path in _as_list(self.path) for file in _files_at(Path(path))]
        return [file for pattern in _as_list(self.origin_file_pattern) or [""] for file in self._fetch(pattern)]

    def _fetch(self, pattern: str) -> list[Path]:
        """The files of one pattern, downloaded if they are absent."""
        reason = ""
        if self._is_incomplete(pattern):
            reason = self._download(pattern)
        if absent := self._absent(pattern):
            raise (NotInRepository if reason.endswith(NO_SUCH_FILE) else FileNotFoundError)(
                f"{self.model_id}: {', '.join(absent)} not found in {self.folder} ({reason}). Copy the files there, "
                f"or set DIFFSYNTH_MODEL_BASE_PATH to the folder that holds {self.model_id}/, "
                "or DIFFSYNTH_DOWNLOAD_SOURCE to modelscope or huggingface, and leave DIFFSYNTH_SKIP_DOWNLOAD unset."
            )
        return self._matches(pattern)

    def _matches(self, pattern: str) -> list[Path]:
        return [self.folder / pattern] if _is_folder(pattern) else sorted(self.folder.glob(pattern))

    def _absent(self, pattern: str) -> list[str]:
        """Names of the files of a pattern that are not on this machine, as far as local files tell."""
        if _is_folder(pattern):
            return [] if is_complete(self.folder / pattern) else [pattern or "all files"]
        files = self._matches(pattern)
        return [file.name for file in missing_shards(files)] if files else [pattern]

    def _is_incomplete(self, pattern: str) -> bool:
        return bool(self._absent(pattern)) or self._lacks_config(pattern)

    def _lacks_config(self, pattern: str) -> bool:
        if self.config or not pattern.endswith(".safetensors"):
            return False
        return not all((file.parent / "config.json").exists() for file in self._matches(pattern))

    def _download(self, pattern: str) -> str:
        """Download the files of a pattern; return the reason why files may still be absent."""
        if self.skips_download:
            return "downloads are switched off"
        endpoint, snapshot_download = _hub(self.source)
        if not answers(endpoint):
            return f"{endpoint} does not answer"
        with locked(self.folder):  # all processes of a run call this; the first one downloads
            error = self._take_snapshot(snapshot_download, pattern) if self._is_incomplete(pattern) else None
        return f"{endpoint} {NO_SUCH_FILE}" if error is None else f"{endpoint} answered: {error}"

    def _take_snapshot(self, snapshot_download: Callable, pattern: str) -> str | None:
        """Download the files of a pattern; return the client's error."""
        try:
            with marked(self.folder / pattern) if _is_folder(pattern) else nullcontext():
                snapshot_download(self.model_id, revision=self.revision, local_dir=self.folder, **_selection(pattern))
        except Exception as error:  # the clients' errors have no base class in common
            return f"{type(error).__name__}: {error}"
        return None


def missing_shards(files: list[Path]) -> list[Path]:
    """Shards that are not in `files`, although a name in it ("-00001-of-00009") or an index beside it names them."""
    expected = set()
    for file in files:
        if name := SHARD_NAME.fullmatch(file.name):
            stem, count, suffix = name["stem"], name["count"], name["suffix"]
            numbers = range(1, int(count) + 1)
            expected |= {file.with_name(f"{stem}-{number:05d}-of-{count}{suffix}") for number in numbers}
    for index in {index for file in files for index in file.parent.glob("*.index*.json")}:
        shards = {index.with_name(shard) for shard in _shards_in(index)}
        # A folder may hold several variants of the weights, each with its index.
        if shards & set(files):
            expected |= shards
    return sorted(expected - set(files))


def _shards_in(index: Path) -> set[str]:
    """Names of the shards that an index lists.

    Raises:
        ValueError: It lists none, or a name that leads to another folder.
    """
    weight_map = read_object(index).get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else {str(weight_map)}
    if bad := sorted(name for name in names if not SHARD.fullmatch(name)):
        raise ValueError(
            f"{index} names the shard {bad[0]!r:.99}; expected names of files beside it, such as "
            "model-00001-of-00002.safetensors. Delete it and download it again."
        )
    return names


def refuse_pickle(name: str | Path) -> None:
    """Raise ValueError for a file that is a pickle by its suffix: unpickling runs code that the file contains."""
    if Path(name).suffix in PICKLE_SUFFIXES:
        raise ValueError(
            f"{name} is a pickle, and pickles are never loaded, as they can run code. If you trust it, convert it: "
            f'python -c "import torch, safetensors.torch as s; s.save_file(torch.load({str(name)!r}, '
            f'weights_only=True), {str(Path(name).with_suffix(".safetensors"))!r})"'
        )


def _as_list(value: str | os.PathLike | list | None) -> list:
    if value is None:
        return []
    return [value] if isinstance(value, str | os.PathLike) else list(value)


def _files_at(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"{path.absolute()} does not exist. Expected a .safetensors file or a folder.")
    if path.is_dir():
        return sorted(path.glob("*.safetensors")) or [path]
    return [path]


def _is_folder(pattern: str) -> bool:
    return pattern == "" or pattern.endswith("/")


def _selection(pattern: str) -> dict[str, list[str]]:
    """A pattern as arguments of the hubs' `snapshot_download`; config.json and the index come along with weights."""
    if _is_folder(pattern):
        return {"allow_patterns": [f"{pattern}*"], "ignore_patterns": []}
    folder = pattern[: pattern.rfind("/") + 1]
    # In the hubs' patterns "*" also matches "/"; here it does not.
    return {
        "allow_patterns": [pattern, f"{folder}config.json", f"{folder}*.index*.json"],
        "ignore_patterns": [f"{folder}*/*"],
    }


def _hub(source: str) -> tuple[str, Callable]:
    """The address of a hub and its client's `snapshot_download`."""
    if source == "modelscope":
        from modelscope import snapshot_download

        return modelscope_endpoint(), snapshot_download

    from huggingface_hub import constants, snapshot_download

    return constants.ENDPOINT, snapshot_download
