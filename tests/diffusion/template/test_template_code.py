"""A template's folder: what its model.py may say, when it runs, and which weights it gets."""

import os
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
import templates
import torch
import warm
from safetensors.torch import load_file, save_file

from diffsynth.core.loader import ModelConfig, model_config
from diffsynth.diffusion.template import Templates, load_state_dict, load_template_model
from diffsynth.diffusion.template.code import module_name, read_code
from diffsynth.diffusion.template.model import load_template
from diffsynth.diffusion.template.source import find_template

MODEL_ID = "someone/a-template"
COMMIT = {name: name * 40 for name in "ab"}
# Writes down that it was run.
LOUD = """
from pathlib import Path
import torch

with (Path(__file__).parent / "runs.txt").open("a") as file:
    file.write("run\\n")


class Loud(torch.nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.layer = torch.nn.Linear(width, 3)

    def process_inputs(self, **kwargs):
        return {}

    def forward(self, **kwargs):
        return {}


class Processor:
    def __call__(self, scale, **kwargs):
        return {"value": 2 * scale}


TEMPLATE_MODEL = Loud
TEMPLATE_DATA_PROCESSOR = Processor
"""


@pytest.fixture
def loud(tmp_path) -> Path:
    return templates.write(tmp_path / "loud", LOUD)


def runs(folder: Path) -> int:
    file = folder / "runs.txt"
    return file.read_text().count("run") if file.exists() else 0


# Code -----------------------------------------------------------------------------------------------------------------


def test_code_runs_once_however_often_it_is_loaded(loud):
    models = [load_template_model(loud), load_template_model(str(loud)), read_code(loud).model()]
    assert runs(loud) == 1 and len({type(model) for model in models}) == 1


def test_changed_code_runs_anew_though_nothing_else_of_the_file_changed(loud):
    before = read_code(loud)
    stat = (loud / "model.py").stat()
    templates.write(loud, LOUD, ("2 * scale", "3 * scale"))
    os.utime(loud / "model.py", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = read_code(loud)
    assert [code.data_processor()(scale=1) for code in (before, after)] == [{"value": 2}, {"value": 3}]
    assert runs(loud) == 2 and not list(loud.glob("__pycache__"))


def test_equal_code_in_two_folders_knows_its_own(tmp_path):
    folders = [templates.write(tmp_path / name, LOUD) for name in "ab"]
    assert len({read_code(folder).model for folder in folders}) == 2
    assert [runs(folder) for folder in folders] == [1, 1]


def test_what_a_template_makes_can_be_pickled(loud):
    model = load_template_model(loud)
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model) and torch.equal(again.layer.weight, model.layer.weight)


def test_another_process_imports_it_by_itself(loud):
    processor = read_code(loud).data_processor()
    with ProcessPoolExecutor(1, warm.SERVER) as pool:
        assert pool.submit(processor, scale=4).result() == {"value": 8}
    assert runs(loud) == 2


def test_a_pickle_of_code_that_changed_is_refused(loud):
    dumped = pickle.dumps(read_code(loud).data_processor())
    sys.modules.pop(module_name(loud / "model.py"))
    templates.write(loud, LOUD, ("2 * scale", "3 * scale"))
    with pytest.raises(ImportError, match="model.py is not what it was"):
        pickle.loads(dumped)


@pytest.mark.parametrize(
    "change, message",
    [
        (("TEMPLATE_MODEL = Loud", ""), "TEMPLATE_MODEL is None, expected a class that extends torch.nn.Module"),
        (("= Loud", "= Loud()"), r"TEMPLATE_MODEL is Loud\("),
        (("def forward(self, **kwargs)", "def forward(self, x)"), r"Loud.forward takes \(self, x\); expected .*kwargs"),
        (("def process_inputs(self, **kwargs)", "def process_input(self)"), "Loud.process_inputs is not there"),
        (("def forward(self, **kwargs)", "def forward(self, model_id, **kwargs)"), "takes model_id, which is reserved"),
        (("= Processor", "= Processor()"), "TEMPLATE_DATA_PROCESSOR is <.*expected a class with __call__"),
        (("= Processor", "= dict"), "TEMPLATE_DATA_PROCESSOR is <class 'dict'>"),
        (("import torch", "import torch\nraise KeyError('x')"), "model.py, line 4: cannot be imported: KeyError: 'x'"),
        (("import torch", "import torch\nx = ("), "cannot be imported: SyntaxError: '\\(' was never closed"),
        (("= Loud", "= Loud\nTEMPLATE_MODEL_PATH = 3"), "TEMPLATE_MODEL_PATH is 3, expected a file name, a list"),
        (("= Loud", "= Loud\nTEMPLATE_MODEL_PATH = 'a.bin'"), "a.bin is a pickle, and pickles are never loaded"),
        (
            ("= Loud", "= Loud\nTEMPLATE_MODEL_PATH = ['gone.safetensors']"),
            "gone.safetensors not found, which TEMPLATE",
        ),
        (
            ("= Loud", "= Loud\nTEMPLATE_MODEL_CONFIG = {'depth': 1}"),
            "{'depth': 1} does not fit Loud: got an unexpected",
        ),
        (("= Loud", "= Loud\nTEMPLATE_MODEL_CONFIG = [1]"), r"TEMPLATE_MODEL_CONFIG is \[1\], expected a dict"),
        (("= Loud", "= Loud\nTEMPLATE_MODEL_CONFIG = {'width': 'a'}"), "Loud cannot be built: TypeError"),
    ],
)
def test_what_no_template_is_is_refused_by_name(change, message, tmp_path):
    folder = templates.write(tmp_path / "template", LOUD, change)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refused:
        load_template_model(folder)
    assert str(folder / "model.py") in str(refused.value) or "pickle" in message


def test_a_folder_without_code_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.py not found; a template's folder holds a model.py"):
        load_template_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone is no folder"):
        find_template(ModelConfig(path=str(tmp_path / "gone")))


def test_the_constructor_gets_its_arguments(tmp_path):
    folder = templates.write(tmp_path / "template", LOUD, ("= Loud", "= Loud\nTEMPLATE_MODEL_CONFIG = {'width': 7}"))
    assert load_template_model(folder).layer.in_features == 7


# A hub's --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Commits of a template on a hub, by name, and what was fetched of them."""
    commits = {name: templates.write(tmp_path / f"commit-{name}", LOUD + f"\nNAME = {name!r}\n") for name in "ab"}
    fetched = []

    def snapshot_download(model_id, revision, local_dir, allow_patterns, **_):
        source = commits[(revision or "b")[0]]
        names = [name for name in ("model.py", "model.safetensors") if allow_patterns[0] in ("*", name)]
        for name in names:
            local_dir.mkdir(parents=True, exist_ok=True)
            (local_dir / name).write_bytes((source / name).read_bytes() if (source / name).exists() else b"")
        fetched.append((model_id, revision, names))

    monkeypatch.setattr(model_config, "_hub", lambda source: ("hub", snapshot_download))
    monkeypatch.setattr(model_config, "answers", lambda endpoint: True)
    monkeypatch.delenv("DIFFSYNTH_SKIP_DOWNLOAD", raising=False)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    return fetched


def test_a_hubs_code_does_not_run_without_consent_and_is_shown(hub, tmp_path):
    for options in ({}, {"revision": COMMIT["a"]}):
        with pytest.raises(ValueError, match="has not been run: trust_remote_code is false") as refused:
            find_template(ModelConfig(model_id=MODEL_ID, **options))
        message = str(refused.value)
        (shown,) = (path for path in (tmp_path / "models").rglob("model.py") if str(path) in message)
        assert f"SHA-256 {sha256(shown.read_bytes()).hexdigest()}, begins:\n" in message
        assert "from pathlib import Path" in message and f"{len(LOUD.splitlines()) + 2} lines" in message
        assert runs(shown.parent) == 0
    assert [names for _, _, names in hub] == [["model.py"], ["model.py"]]


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT["a"][:7]])
def test_consent_without_a_commit_is_none(revision, hub):
    with pytest.raises(ValueError, match=f"revision is {revision!r}, which is no commit"):
        find_template(ModelConfig(model_id=MODEL_ID, revision=revision, trust_remote_code=True))


def test_a_hub_that_does_not_answer_is_said_to(hub, monkeypatch):
    monkeypatch.setattr(model_config, "answers", lambda endpoint: False)
    with pytest.raises(ValueError, match="It cannot be shown: .*hub does not answer"):
        find_template(ModelConfig(model_id=MODEL_ID))


def test_with_consent_the_whole_repository_comes_each_commit_by_itself(hub):
    asked = [ModelConfig(model_id=MODEL_ID, revision=COMMIT[name], trust_remote_code=True) for name in "ab"]
    with pytest.raises(ValueError):  # an earlier read of its code must not be taken for all of it
        find_template(ModelConfig(model_id=MODEL_ID, revision=COMMIT["a"]))
    folders = [find_template(config) for config in [*asked, asked[0]]]
    assert folders[0] == folders[2] != folders[1]
    for folder, name in zip(folders, "ab", strict=False):
        assert (folder / "model.safetensors").exists()
        assert name == sys.modules[read_code(folder).model.__module__].NAME
    assert len(hub) == 3


def test_a_local_folder_of_that_name_wins_and_runs(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    templates.write(tmp_path / MODEL_ID, LOUD)
    assert find_template(ModelConfig(model_id=MODEL_ID)) == Path(MODEL_ID) and hub == []


def test_what_was_downloaded_by_others_is_not_taken_for_local(hub, tmp_path):
    folder = templates.write(tmp_path / "models" / MODEL_ID, LOUD)
    with pytest.raises(ValueError, match="trust_remote_code is false"):
        find_template(ModelConfig(model_id=MODEL_ID))
    assert runs(folder) == 0


# Weights --------------------------------------------------------------------------------------------------------------


def trained(folder: Path, name: str, *keys: str, value: float = 0.5) -> None:
    """A file of weights in a template's folder, which model.py names after all those before it."""
    tensors = load_template_model(folder, torch_dtype=torch.float32).state_dict()
    save_file({key: torch.full_like(tensors[key], value) for key in keys}, folder / name)
    text = (folder / "model.py").read_text()
    (folder / "model.py").write_text(
        f"{text}\nTEMPLATE_MODEL_PATH = {[path.name for path in sorted(folder.glob('*.s*'))]}"
    )


def test_without_a_file_weights_are_the_constructors_of_one_seed(loud, caplog):
    first, again, other = (load_template(read_code(loud), seed).model.layer.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    state = torch.get_rng_state()
    model = load_template_model(loud)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.layer.weight.dtype == torch.bfloat16 and not model.training and not model.layer.weight.requires_grad
    assert "sets no TEMPLATE_MODEL_PATH" in caplog.text and "set TEMPLATE_MODEL_PATH to their file" in caplog.text


def test_weights_come_from_the_files_of_which_later_ones_win(loud, caplog):
    trained(loud, "a.safetensors", "layer.weight", "layer.bias", value=0.25)
    trained(loud, "b.safetensors", "layer.bias", value=0.75)
    caplog.clear()
    model = load_template_model(loud)
    assert model.layer.weight.unique().tolist() == [0.25] and model.layer.bias.unique().tolist() == [0.75]
    assert caplog.text == ""


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"layer.weight": (3, 2)}, "layer.bias is missing, and random"),
        ({"layer.weight": (3, 3), "layer.bias": (3,)}, r"layer.weight is \(3, 3\), expected \(3, 2\)"),
        ({"layer.weight": (3, 2), "layer.bias": (3,), "a": (1,)}, "a is unexpected"),
        ({f"{n}": (1,) for n in range(9)}, "2 is unexpected\n  and 8 more\n.*TEMPLATE_MODEL_PATH = .frozen, trained"),
    ],
)
def test_weights_that_do_not_fit_are_named(tensors, message, loud):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, loud / "model.safetensors")
    templates.write(loud, LOUD + '\nTEMPLATE_MODEL_PATH = "model.safetensors"')
    with pytest.raises(ValueError, match=f"(?s)model.safetensors does not fit Loud of {loud}/model.py:.*{message}"):
        load_template_model(loud)


def test_what_the_constructor_loads_by_itself_need_not_be_in_a_file(tmp_path):
    folder = templates.write(tmp_path / "template", templates.FROZEN_PART)
    trained(folder, "model.safetensors", "mlp.weight", "mlp.bias")
    model = load_template_model(folder, torch_dtype=torch.float32)
    assert model.encoder.weight.flatten().tolist() == [0, 1, 2, 3, 4, 5] and model.mlp.bias.unique().item() == 0.5


# seeds/template_model_training.md, Step 3.
PACKING = """
from diffsynth.diffusion.template import load_template_model, load_state_dict
from safetensors.torch import save_file
import torch

model = load_template_model("path/to/your/template/model", torch_dtype=torch.bfloat16, device="cpu")
state_dict = load_state_dict("path/to/your/ckpt/epoch-1.safetensors", torch_dtype=torch.bfloat16, device="cpu")
state_dict.update(model.state_dict())
save_file(state_dict, "model.safetensors")
"""


def test_packing_as_printed_keeps_what_was_trained_and_adds_what_was_not(tmp_path, monkeypatch):
    """Step 1 has been done: model.py names the trained file, which lies beside it."""
    folder = templates.write(tmp_path / "path/to/your/template/model", templates.FROZEN_PART)
    trained(folder, "model.safetensors", "mlp.weight", "mlp.bias")
    (tmp_path / "path/to/your/ckpt").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "path/to/your/ckpt/epoch-1.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="model.safetensors not found.*put the trained file there under that name"
    ):
        exec(PACKING, {})
    (folder / "model.safetensors").write_bytes((tmp_path / "path/to/your/ckpt/epoch-1.safetensors").read_bytes())
    exec(PACKING, {})
    packed = load_file(tmp_path / "model.safetensors")
    assert packed.keys() == load_template_model(folder).state_dict().keys()
    assert packed["mlp.weight"].unique().tolist() == [0.5] and packed["encoder.bias"].unique().tolist() == [0.25]
    assert {tensor.dtype for tensor in packed.values()} == {torch.bfloat16}


def test_state_dicts_are_read_in_the_dtype_asked_for(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert load_state_dict(str(tmp_path / "a.safetensors"), torch_dtype=torch.bfloat16)["a"].dtype == torch.bfloat16
    assert load_state_dict(tmp_path / "a.safetensors")["a"].dtype == torch.float32


# The configuration's node ---------------------------------------------------------------------------------------------


def test_one_template_is_trained():
    for path in (None, ["a", "b"]):
        with pytest.raises(ValueError, match="expected the folder of the one template that is trained"):
            Templates(path=path).load_one()


def test_folders_and_a_repository_are_named_in_order():
    found = Templates(path=["a", "b"], model_id=MODEL_ID, revision=COMMIT["a"], trust_remote_code=True).configs
    assert [config.path or config.model_id for config in found] == ["a", "b", MODEL_ID]
    assert found[2].revision == COMMIT["a"] and found[2].trust_remote_code
