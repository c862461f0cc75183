"""Merging adapters from the command line: which folders it may write over."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from diffsynth.diffusion.pipeline import networks

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
    with pytest.raises(ValueError) as refused:
        fuse(*given)
    return str(refused.value)


def test_a_folder_with_other_files_is_not_replaced(adapter, tmp_path, monkeypatch):
    notes = tmp_path / "keep" / "transformer" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    assert "holds files that this program has not made" in refusal(monkeypatch, adapter, tmp_path / "keep")
    assert notes.read_text() == "mine"


def test_the_base_that_is_read_is_not_replaced(adapter, tmp_path, monkeypatch):
    base = Path(shutil.copytree(tiny.model(), tmp_path / "base"))
    before = (base / "transformer" / "config.json").read_bytes()
    said = refusal(monkeypatch, adapter, base, f"model.dit.path={base}/transformer")
    assert "is read; set another output" in said
    assert (base / "transformer" / "config.json").read_bytes() == before


@pytest.mark.parametrize("rest", ["link", "copy"])
def test_diffusers_loads_the_merged_repository(rest, adapter, tmp_path):
    from diffusers import DiffusionPipeline

    base = tiny.model()
    shutil.copytree("models/emoji/scheduler", tmp_path / "base" / "scheduler")
    shutil.copy("models/emoji/model_index.json", tmp_path / "base")
    for part in base.iterdir():
        if part.is_dir() and part.name != "scheduler":
            shutil.copytree(part, tmp_path / "base" / part.name)
    parts = [f"model.{key}.path={tmp_path}/base/{name}" for key, name in PARTS.items()]
    (merged,) = fuse(adapter, tmp_path / "out", f"rest={rest}", *parts)
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
    (tmp_path / "out" / "transformer").mkdir(parents=True)
    (first,) = fuse(adapter, tmp_path / "out")
    (second,) = fuse(adapter, tmp_path / "out", "lora_scale=2")
    assert first == second and load_file(next(second.glob("*.safetensors")))
    said = refusal(monkeypatch, adapter, tmp_path / "out", f"model.dit.path={second}")
    assert "is read; set another output" in said
