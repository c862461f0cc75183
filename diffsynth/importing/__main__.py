"""Print our commands for commands of DiffSynth-Studio: `python -m diffsynth.importing FILE.sh [model=…] [exact=true]`.

FILE is a shell script with `accelerate launch …/train.py`, or the training_args.json of a run. The exit status is 1 if
a command cannot run here, or a flag is refused or unknown.
"""

import sys

from ..core.process.console import keep_console
from ..core.process.library_warnings import drop_needless_warnings
from .printing import printed
from .translate import translate


def main(arguments: list[str]) -> int:
    """Print the commands, and return the exit status.

    Raises:
        ValueError: The command line or the file has a mistake.
    """
    files = [word for word in arguments if "=" not in word]
    options = dict(word.split("=", 1) for word in arguments if "=" in word)
    unknown = options.keys() - {"model", "exact"}
    if len(files) != 1 or unknown or options.get("exact", "true") not in ("true", "false"):
        raise ValueError(f"{' '.join(arguments) or 'nothing'} is typed; expected FILE.sh [model=…] [exact=true].")
    ours = translate(files[0], options.get("model", ""), options.get("exact") == "true")
    print(printed(ours))
    return not all(each.runs for each in ours if each.commands)


if __name__ == "__main__":
    keep_console()
    drop_needless_warnings()
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
