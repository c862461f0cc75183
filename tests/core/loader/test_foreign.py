"""Files of anybody's: whatever is in them, the answer is a module or one line that names the file, and no code runs."""

import ast
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from diffsynth.core.loader import ModelConfig, build_module, check_weights, load_state_dict
from diffsynth.diffusion.pipeline.components import Folder
from diffsynth.diffusion.rewards import ClipScore
from diffsynth.training.validation.metrics import FrechetDistance

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tmp_path) -> Path:
    """The folder of a tiny transformer."""
    return Path(shutil.copytree(tiny.model() / "transformer", tmp_path / "transformer"))


def built(model: Path) -> torch.nn.Module:
    """The module of a folder, checked without reading a tensor, as a run does before it loads."""
    config = ModelConfig(str(model))
    module = build_module(config.resolve())
    check_weights(module, config.resolve())
    return module


def complaint(model: Path) -> str:
    with pytest.raises(ValueError) as error:
        built(model)
    return str(error.value)


# Weights --------------------------------------------------------------------------------------------------------------


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(begin: object, end: object, dtype: object = "F32", shape: object = (1,)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


MALFORMED = {
    "overlap": safetensors({"a": tensor(0, 4), "b": tensor(2, 6)}, bytes(6)),
    "gap": safetensors({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)),
    "beyond the end": safetensors({"a": tensor(0, 400)}, bytes(4)),
    "before the beginning": safetensors({"a": tensor(-4, 4)}, bytes(4)),
    "another size": safetensors({"a": tensor(0, 4, shape=[3])}, bytes(4)),
    "unknown dtype": safetensors({"a": tensor(0, 4, "X99")}, bytes(4)),
    "a list": safetensors([1, 2]),
    "no offsets": safetensors({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "offsets of text": safetensors({"a": tensor("0", "4")}, bytes(4)),
    "deep": safetensors(b"[" * 100_000),
    "no UTF-8": safetensors(b'{"\xff": 1}'),
    "cut off": safetensors({"a": tensor(0, 4)}, bytes(4))[:-1],
    "a header of 100 GB": (10**11).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_file_of_weights_is_named_in_one_line(kind, model):
    (model / WEIGHTS).write_bytes(MALFORMED[kind])
    message = complaint(model)
    assert str(model / WEIGHTS) in message and "\n" not in message and "download it again" in message
    with pytest.raises(ValueError, match=WEIGHTS):  # an adapter is read by this
        load_state_dict(model / WEIGHTS)


@pytest.mark.skipif(os.name != "posix", reason="needs files with holes")
def test_a_header_of_100_gb_that_is_there_is_not_read(model):
    with (model / WEIGHTS).open("wb") as file:
        file.write((10**11).to_bytes(8, "little"))
        file.truncate(10**11 + 8)
    start = time.monotonic()
    assert "is no safetensors file, or is cut off" in complaint(model)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("dtype, name", [(torch.int32, "I32"), (torch.float8_e8m0fnu, "F8_E8M0")])
def test_weights_without_fractions_are_named(dtype, name, model):
    tensors = load_file(model / WEIGHTS)
    tensors["proj_out.bias"] = tensors["proj_out.bias"].to(dtype)
    (model / WEIGHTS).write_bytes(save(tensors))
    assert f"proj_out.bias in {model / WEIGHTS} has dtype {name}, expected one with fractions" in complaint(model)


@pytest.mark.parametrize(
    "index", ['{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "/x"}}', '{"weight_map": {"a": ""}}']
    + ['{"weight_map": [1]}', '{"weight_map": {"a": null}}', "{}", "[]", "nonsense", '{"weight_map": {"a": "C:x.y"}}'],
)  # fmt: skip
def test_an_index_that_names_other_places_is_refused(index, model):
    file = model / f"{WEIGHTS}.index.json"
    file.write_text(index)
    message = complaint(model)
    assert str(file) in message and "\n" not in message


# config.json ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ([1, 2], "it holds a list, expected an object"),
        ("{", "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ({"_class_name": ["QwenImageTransformer2DModel"]}, "names no class"),
        ({"_class_name": None, "architectures": 3}, "names no class"),
        ({"num_layers": 3_000_000}, "it has more than"),
        ({"num_layers": 10**12}, "num_layers is 1000000000000, expected at most"),
        ({"axes_dims_rope": [10**12, 1]}, "axes_dims_rope.0 is"),
        ({"num_layers": "many"}, "no QwenImageTransformer2DModel can be built of it: TypeError"),
        ({"attention_head_dim": -3}, "no QwenImageTransformer2DModel can be built of it"),
    ],
)
def test_a_config_of_anybodys_is_a_line_that_names_it_and_takes_seconds(change, message, model):
    file, start = model / "config.json", time.monotonic()
    content = json.loads(file.read_text())
    file.write_text(
        change if isinstance(change, str) else json.dumps(content | change if isinstance(change, dict) else change)
    )
    said = complaint(model)
    assert str(file) in said and message in said and "\n" not in said
    assert time.monotonic() - start < 60  # about 3 s on two busy cores; hours if three million layers were built


def test_building_leaves_no_hook_behind(model):
    from torch.nn.modules import module

    before = len(module._global_parameter_registration_hooks), len(module._global_module_registration_hooks)
    built(model)
    assert (len(module._global_parameter_registration_hooks), len(module._global_module_registration_hooks)) == before


# Code in a model's folder ---------------------------------------------------------------------------------------------

TRAP = "from pathlib import Path\nPath({path!r}).write_text('ran')\nclass Trap: pass\n"
NAMES = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")


@pytest.fixture
def trap(tmp_path, monkeypatch) -> Path:
    """A folder whose every configuration asks for its own code, which writes `sprung`; the user answers y."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = tmp_path / "trap"
    folder.mkdir()
    (folder / "trap.py").write_text(TRAP.format(path=str(tmp_path / "sprung")))
    classes = {name: ["trap.Trap", "trap.Trap"] if name == "AutoTokenizer" else "trap.Trap" for name in NAMES}
    kinds = {"config.json": "model_type", "tokenizer_config.json": "tokenizer_class"}
    for name in (*kinds, "preprocessor_config.json", "processor_config.json"):
        key = kinds.get(name, "image_processor_type")
        (folder / name).write_text(json.dumps({"auto_map": classes, key: "trap"}))
    return folder


@pytest.mark.parametrize(
    "read",
    [
        *(Folder(kind).read for kind in ("AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "Qwen2Tokenizer")),
        *(lambda folder, part=part: getattr(metric(folder), part) for part in ("network", "processor")),
        lambda folder: metric(folder, ClipScore).network,
    ],
    ids=["AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "Qwen2Tokenizer", "network", "processor", "clip"],
)
def test_no_code_of_a_models_folder_runs_even_if_the_user_would_agree(read, trap):
    with suppress(ValueError):
        read(trap)
    assert not (trap.parent / "sprung").exists()


def metric(folder: Path, kind: type = FrechetDistance) -> ClipScore | FrechetDistance:
    """A metric whose network's files are found."""
    found = kind(ModelConfig(str(folder)))
    found.files = [folder]
    return found


def test_one_function_reads_pretrained_parts():
    users = []
    for file in (tiny.ROOT / "diffsynth").rglob("*.py"):
        calls = (node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call))
        attributes = {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)}
        users += [file.name] if "from_pretrained" in attributes else []
    assert users == ["foreign.py"]


# Any damage -----------------------------------------------------------------------------------------------------------

FILES = {
    "transformer/config.json": lambda root: built(root / "transformer"),
    f"transformer/{WEIGHTS}": lambda root: built(root / "transformer"),
    "tokenizer/tokenizer_config.json": lambda root: Folder("Qwen2Tokenizer").read(root / "tokenizer"),
    "tokenizer/tokenizer.json": lambda root: Folder("Qwen2Tokenizer").read(root / "tokenizer"),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    return Path(shutil.copytree(tiny.model(), tmp_path_factory.mktemp("foreign") / "model"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), name=st.sampled_from(sorted(FILES)))
def test_any_damage_is_one_line_that_names_the_file_or_harmless(data, name, repository):
    file = repository / name
    whole = file.read_bytes()
    start = data.draw(st.integers(0, min(len(whole), 3000)))
    length = data.draw(st.integers(0, 50))
    end = data.draw(st.sampled_from([b"", whole[start + length :]]))
    try:
        file.write_bytes(whole[:start] + data.draw(st.binary(max_size=20)) + end)
        FILES[name](repository)
    except ValueError as error:
        assert file.parent.name in str(error) and (str(file) in str(error) or str(file.parent) in str(error))
        assert "\n" not in str(error) or "do not fit Qwen" in str(error)  # a line for each tensor
    finally:
        file.write_bytes(whole)
