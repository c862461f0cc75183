"""Merging adapters from the command line: which folders it may write over."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from diffsynth.core.files import MADE, mark_as_made
from diffsynth.core.loader import ModelConfig, model_config
from diffsynth.diffusion.pipeline import networks
from diffsynth.diffusion.pipeline.repository import INDEX, find_index

PARTS = {"dit": "transformer", "text_encoder": "text_encoder", "vae": "vae", "tokenizer": "tokenizer"}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "style.safetensors"
    layer = "transformer.transformer_blocks.0.attn.to_v"
    save_file(
        {f"{layer}.lora_{part}.weight": torch.ones(shape) for part, shape in (("A", (2, 128)), ("B", (128, 2)))}, path
    )
    return path


def fuse(adapter: Path, output: Path, *overrides: str) -> list[Path]:
    return tiny.call(
        "fuse", tiny.compose("fuse", *tiny.model_overrides(), f"lora_path={adapter}", f"output={output}", *overrides)
    )


def refusal(monkeypatch, *given) -> str:
    """What it says before it reads weights."""
    monkeypatch.setattr(networks, "load_weights", None)
    with pytest.raises((ValueError, OSError)) as refused:
        fuse(*given)
    return str(refused.value)


def test_a_folder_with_other_files_is_not_replaced(adapter, tmp_path, monkeypatch):
    notes = tmp_path / "keep" / "transformer" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    assert "holds files that this program has not made" in refusal(monkeypatch, adapter, tmp_path / "keep")
    assert notes.read_text() == "mine"


def test_a_folder_of_pictures_is_refused_before_anything_is_written(adapter, tmp_path, monkeypatch):
    pictures = Path(shutil.copytree(tiny.dataset(), tmp_path / "pictures"))
    before = sorted(pictures.rglob("*"))
    given = [*tiny.model_overrides(), f"lora_path={adapter}", f"output={pictures}"]
    said = tiny.complaint(monkeypatch, *given, script="fuse.py")
    assert f"{pictures} holds files that this program has not made; expected a new or an empty folder" in said
    assert sorted(pictures.rglob("*")) == before


def test_the_folder_is_printed_and_how_diffusers_loads_it(base, adapter, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    given = [*tiny.model_overrides(), *base[1], f"lora_path={adapter}", f"output={out}"]
    tiny.command_line(monkeypatch, "fuse.py", *given)
    assert capsys.readouterr().out.endswith(f'{out}\nDiffusionPipeline.from_pretrained("{out}")\n')


def test_the_base_that_is_read_is_not_replaced(adapter, tmp_path, monkeypatch):
    base = Path(shutil.copytree(tiny.model(), tmp_path / "base"))
    before = (base / "transformer" / "config.json").read_bytes()
    said = refusal(monkeypatch, adapter, base, f"model.dit.path={base}/transformer")
    assert f"{base} holds files that this program has not made" in said
    mark_as_made(base)
    said = refusal(monkeypatch, adapter, base, f"model.dit.path={base}/transformer")
    assert "is read; set another output" in said
    assert (base / "transformer" / "config.json").read_bytes() == before


@pytest.fixture
def base(tmp_path) -> tuple[Path, list[str]]:
    """A whole repository, and the settings that name its parts."""
    folder = Path(shutil.copytree(tiny.model(), tmp_path / "base"))
    shutil.copytree("models/emoji/scheduler", folder / "scheduler", dirs_exist_ok=True)
    shutil.copy("models/emoji/model_index.json", folder)
    return folder, [f"model.{key}.path={folder}/{name}" for key, name in PARTS.items()]


def refuse_links(*_, **__):
    raise PermissionError(1, "Operation not permitted")


def own_index(output: Path, monkeypatch) -> str:
    (output / "model_index.json").write_text("{}")
    return "model_index.json would be replaced"


def own_link(output: Path, monkeypatch) -> str:
    (output / "mine").mkdir()
    (output / "vae").symlink_to(output / "mine")
    return "vae would be replaced, but is a link to"


def no_links(output: Path, monkeypatch) -> str:
    (output / "vae").mkdir()
    mark_as_made(output / "vae")
    monkeypatch.setattr(Path, "symlink_to", refuse_links)
    return "set rest=copy"


def no_configuration(output: Path, monkeypatch) -> str:
    (output.parent / "base" / "vae" / "config.json").rename(output.parent / "config.json")
    return "base/vae, the vae, has no config.json"


@pytest.mark.parametrize("make", [own_index, own_link, no_links, no_configuration])
def test_what_the_rest_cannot_be_written_over_is_refused_and_kept(make, base, adapter, tmp_path, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()
    mark_as_made(output)
    expected = make(output, monkeypatch)
    before = sorted(output.rglob("*"))
    config = [f"model.vae.config={tmp_path}/config.json"] if make is no_configuration else []
    assert expected in refusal(monkeypatch, adapter, output, *base[1], *config)
    assert sorted(output.rglob("*")) == before


def test_an_index_that_cannot_be_fetched_is_an_error_but_none_is_an_answer(tmp_path, monkeypatch):
    here = ModelConfig(model_id="a/b", local_model_path=str(tmp_path), skip_download=True)
    with pytest.raises(FileNotFoundError, match=r"Or set rest=none\.$"):
        find_index(here)
    with monkeypatch.context() as patch:
        patch.setattr(model_config, "answers", lambda endpoint: True)
        patch.setattr(model_config, "_hub", lambda source: ("hub", lambda *_, **__: None))
        assert find_index(replace(here, skip_download=False)) is None
    here.folder.mkdir(parents=True, exist_ok=True)
    (here.folder / INDEX).write_text("{}")
    assert find_index(here) == here.folder / INDEX  # although there is no scheduler


@pytest.mark.parametrize("rest", ["link", "copy"])
def test_diffusers_loads_the_merged_repository(rest, base, adapter, tmp_path):
    from diffusers import DiffusionPipeline

    for _ in range(2):  # what it has made itself is replaced
        (merged,) = fuse(adapter, tmp_path / "out", f"rest={rest}", *base[1])
    if rest == "copy":
        shutil.rmtree(tmp_path / "base")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out").transformer.state_dict()
    written = load_file(next(merged.glob("*.safetensors")))
    assert all(torch.equal(loaded[key], written[key].to(loaded[key])) for key in written)


def test_a_component_that_the_base_lacks_is_named(adapter, tmp_path, monkeypatch):
    base = Path(shutil.copytree(tiny.model(), tmp_path / "base"))
    (base / "model_index.json").write_text('{"transformer": ["diffusers", "A"], "image_encoder": ["diffusers", "B"]}')
    monkeypatch.setattr(networks, "load_weights", None)
    with pytest.raises(FileNotFoundError, match=r"base/image_encoder is missing, .* set rest=none"):
        fuse(adapter, tmp_path / "out", f"model.dit.path={base}/transformer")


def test_what_it_has_made_and_empty_folders_are_replaced_but_not_while_they_are_read(adapter, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (first,) = fuse(adapter, tmp_path / "out")
    (tmp_path / "out" / MADE).unlink()  # as until 2026-11-30
    (second,) = fuse(adapter, tmp_path / "out", "lora_scale=2")
    assert first == second and load_file(next(second.glob("*.safetensors")))
    said = refusal(monkeypatch, adapter, tmp_path / "out", f"model.dit.path={second}")
    assert "is read; set another output" in said
