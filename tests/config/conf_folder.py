"""The folder conf/: its entries, groups and options."""

import tiny
import yaml

CONF = tiny.ROOT / "conf"
ENTRIES = sorted(path.stem for path in CONF.glob("*.yaml") if (tiny.ROOT / f"{path.stem}.py").exists())


def groups(file: str) -> list[str]:
    """The config groups in a file's list of defaults, and in the files and the task that this names."""
    defaults = yaml.safe_load((CONF / f"{file}.yaml").read_text()).get("defaults", [])
    named = {
        name.removeprefix("/"): option for item in defaults if isinstance(item, dict) for name, option in item.items()
    }
    files = [item.removeprefix("/") for item in defaults if isinstance(item, str) and item != "_self_"]
    files += [f"task/{named['task']}"] if "task" in named else []
    return [name for file in files for name in groups(file)] + [name for name in named if (CONF / name).is_dir()]


def options(group: str) -> list[str]:
    folder = CONF / group
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
    return sorted(name for name in names if not name.split("/")[-1].startswith("_"))
