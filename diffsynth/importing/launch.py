"""The launcher of our command: which file of conf/accelerate/ stands for theirs, and how many processes there are."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from .lines import Differs, LeftOut, Line
from .parsing import Command
from .theirs import whole_number

# Words of accelerate that say how networks compute, which model.torch_dtype decides here.
PRECISION = ("--mixed_precision", "--dynamo_backend")
# Names that torchrun's options have in accelerate.
OF_TORCHRUN = {
    "--nproc_per_node": "--num_processes",
    "--nnodes": "--num_machines",
    "--node_rank": "--machine_rank",
    "--master_addr": "--main_process_ip",
    "--master_port": "--main_process_port",
}


class Launch(NamedTuple):
    """How our command starts.

    Args:
        words: The words before the script.
        processes: Number of processes of a training.
        lines: What to say of their launcher, by its words.
    """

    words: list[str]
    processes: int
    lines: list[tuple[str, Line]]


def launch_of(command: Command, script: Path, project: Path) -> Launch:
    """The launch of our command for one of theirs.

    Args:
        command: Their command.
        script: The file that their command came from; launcher files are looked for in the folders above it.
        project: The folder of our scripts and of `conf`.

    Raises:
        ValueError: A number of processes is none.
    """
    options = dict(_options(command.launcher))
    lines: list[tuple[str, Line]] = []
    if command.launcher[:1] == ("torchrun",):
        options, lines = _from_torchrun(options)
    file = options.pop("--config_file", "")
    dropped = [name for name in PRECISION if options.pop(name, "")]
    lines += [(name, LeftOut("networks compute in model.torch_dtype")) for name in dropped]
    words = ["accelerate", "launch"]
    if file:
        ours, how = _file_for(file, _text(file, script), options, project)
        words += ["--config_file", f"conf/accelerate/{ours}"]
        lines += [("--config_file", Differs(how))] if how else []
    processes = whole_number(options.get("--num_processes", "1"), "num_processes")
    if file and processes == _processes_of(project / "conf" / "accelerate" / ours):
        del options["--num_processes"]
    option_words = [word for name, value in options.items() for word in (name, value) if word]
    return Launch([*words, *option_words], processes, lines)


def _from_torchrun(options: dict[str, str]) -> tuple[dict[str, str], list[tuple[str, Line]]]:
    """Options of torchrun by their names in accelerate, which counts the processes of all machines together."""
    named = {name.replace("-", "_").replace("__", "--", 1): value for name, value in options.items()}
    found = {OF_TORCHRUN[name]: value for name, value in named.items() if name in OF_TORCHRUN}
    machines = whole_number(found.get("--num_machines", "1"), "nnodes")
    processes = whole_number(found.get("--num_processes", "1"), "nproc_per_node") * machines
    others = [(name, LeftOut("accelerate launch finds it itself")) for name in named if name not in OF_TORCHRUN]
    return {**found, "--num_processes": str(processes)}, others


def _file_for(name: str, text: str, options: dict[str, str], project: Path) -> tuple[str, str]:
    """Our file for a launcher file of theirs, and what to say if theirs is absent; `options` get its processes.

    Args:
        name: The name of their file.
        text: What it says; empty if it is not there.
        options: The other options of their launcher.
    """
    ours = f"{_option(Path(name).name, text)}.yaml"
    stated = re.search(r"^num_processes: *(\d+)", text, re.MULTILINE)
    processes = stated[1] if stated else str(_processes_of(project / "conf" / "accelerate" / ours))
    found = options.setdefault("--num_processes", processes)
    return ours, "" if text else f"{name} is not here: {ours} is taken by its name, with num_processes={found}."


def _processes_of(file: Path) -> int:
    return yaml.safe_load(file.read_text(encoding="utf-8"))["num_processes"]


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options of accelerate with their values; empty for one without a value."""
    for number, word in enumerate(words):
        if word.startswith("--"):
            name, _, value = word.partition("=")
            following = words[number + 1] if number + 1 < len(words) else "--"
            yield name, value or ("" if following.startswith("--") else following)


def _text(file: str, script: Path) -> str:
    """The text of their launcher file, relative to this folder or to one above the script; empty if it is not there."""
    places = [Path(), *script.absolute().parents]
    found = next((place / file for place in places if (place / file).is_file()), None)
    return found.read_text(encoding="utf-8", errors="replace") if found else ""


def _option(name: str, text: str) -> str:
    """Our file for a launcher file of theirs: by what it says of DeepSpeed, else by its name."""
    words = f"{name} {text}".lower()
    offloads = re.search(r"offload_(optimizer|param)_device: *['\"]?(cpu|nvme)|cpu_?offload|zero2_?offload", words)
    if re.search(r"zero_stage: *3|(zero|ds_z|stage)_?3", words):
        return "zero3_offload"
    if text and not re.search("deepspeed", words):
        return "ddp"
    return "zero2_offload" if offloads or "14b" in name.lower() else "zero2"
