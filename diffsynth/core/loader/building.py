"""Build a network from its config.json on the meta device, without weights; the file may be anybody's."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from torch import nn
from torch.nn.modules import module as registration

from .foreign import read_object, shown
from .safetensors_files import read_shapes

# Modules and parameters that a network may have: so many for each tensor of its files, and some more; guesses. Building
# 20,000 takes seconds, and three million layers, of which a damaged config.json may speak, would take hours.
PER_TENSOR, MOST_PARTS = 4, 20_000
LARGEST = 1 << 27  # a whole number in a config.json, except bases of RoPE (theta): it may be the length of a table


def build_module(
    files: list[Path] | None,
    config: str | Path | Mapping | None = None,
    classes: Mapping[str, type[nn.Module]] | None = None,
    name: str | None = None,
) -> nn.Module:
    """Build a module without weights, of the diffusers or transformers class that config.json names.

    Parameters are on the meta device; the constructor computes buffers and plain tensors (RoPE tables).

    Args:
        files: The weights; config.json is expected beside the first file.
        config: Another config.json, its folder, or its content.
        classes: Classes to build instead of the library's, by the class name in config.json.
        name: Name of the component, for errors: its key is `model.<name>`.
    """
    from accelerate import init_empty_weights

    config_file = "config" if isinstance(config, Mapping) else find_config(Path(config or files[0].parent), name)
    config = config if isinstance(config, Mapping) else _read_config(config_file)
    network = (classes or {}).get(str(config.get("_class_name"))) or _network_class(config, config_file)
    most = MOST_PARTS + PER_TENSOR * sum(len(read_shapes(file)) for file in files or ())
    try:
        with _at_most(most), init_empty_weights(include_buffers=False):
            if "_class_name" in config:
                return network.from_config(config)
            return network(network.config_class.from_dict(config))
    except Exception as error:  # constructors raise errors of nearly any class for a value that they do not expect
        raise ValueError(
            f"{config_file}: no {network.__name__} can be built of it: {shown(error)}. Use the config.json that was "
            "released with the weights."
        ) from error


@contextmanager
def _at_most(most: int) -> Iterator[None]:
    """Inside, a module that gets more than `most` submodules and parameters raises an error."""
    count = 0

    def register(*_: object) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ValueError(f"it has more than {most} modules and parameters, its files too few tensors for that")

    handles = [
        registration.register_module_module_registration_hook(register),
        registration.register_module_parameter_registration_hook(register),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read_config(file: Path) -> dict:
    config = read_object(file)
    if large := next(_too_large(config), None):
        name, value = large
        raise ValueError(
            f"{file}: {name} is {value}, expected at most {LARGEST}. Use the config.json that was released with the "
            "weights."
        )
    return config


def _too_large(value: object, name: str = "") -> Iterator[tuple[str, int]]:
    """Name and value of each whole number in a config that cannot be the size of anything."""
    if isinstance(value, dict | list):
        for key, element in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _too_large(element, f"{name}.{key}".lstrip("."))
    elif isinstance(value, int) and abs(value) > LARGEST and "theta" not in name:
        yield name, value


def find_config(path: Path, name: str | None = None) -> Path:
    """The config.json of a folder, or the file itself.

    Raises:
        FileNotFoundError: There is none; with the name of a component, the message says which key to set.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        what_to_do = f"type model.{name}.config=… with" if name else "pass config= with"
        raise FileNotFoundError(
            f"{file.absolute()} not found; it names the class of the weights. Put the released config.json beside the "
            f"weights, or {what_to_do} its path. Weights that a run exports have none: take the base's."
        )
    return file


def _network_class(config: Mapping, config_file: Path | str) -> type[nn.Module]:
    import diffusers
    import transformers

    library, names = transformers, config.get("architectures")
    if "_class_name" in config:
        library, names = diffusers, [config["_class_name"]]
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise ValueError(
            f"{config_file} names no class. Expected _class_name (diffusers) or architectures (transformers) in it; "
            "use the config.json that was released with the weights."
        )
    name = names[0]
    network = getattr(library, name, None)
    if not (isinstance(network, type) and issubclass(network, nn.Module)):
        nearest = get_close_matches(name, dir(library), 1)
        raise ValueError(
            f"{config_file} names {name!r:.99}, which is no network of {library.__name__} {library.__version__}. "
            f"Nearest: {', '.join(nearest) or 'none'}. A newer release may have it: pip install -U {library.__name__}"
        )
    return network
