"""Sampling from the command line."""

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from diffsynth.config import ConfigError
from diffsynth.core.pictures import LINE_HEIGHT, row
from diffsynth.diffusion.pipeline import networks as models

SMALL = ["options.num_inference_steps=2", "options.height=32", "options.width=48", "device=cpu"]
APPLE, ROCKET = "a red apple", "a rocket, flying"


@pytest.fixture
def generate(tmp_path):
    """Samples with these overrides and returns the pixels of each file by its name."""

    def sample(*overrides: str) -> dict[str, np.ndarray]:
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        cfg = tiny.compose("generate", *tiny.model_overrides(), *SMALL, f"output={output}", *overrides)
        return {path.name: np.array(Image.open(path), dtype=int) for path in tiny.call("generate", cfg)}

    return sample


@pytest.fixture
def adapter(tmp_path):
    """A LoRA file that changes much."""
    generator = torch.Generator().manual_seed(0)
    layers = [f"transformer.transformer_blocks.{block}.attn.to_v" for block in range(4)]
    shapes = {"lora_A": (4, 128), "lora_B": (128, 4)}
    path = tmp_path / "style.safetensors"
    pairs = [(f"{layer}.{part}.weight", shape) for layer in layers for part, shape in shapes.items()]
    save_file({key: torch.randn(shape, generator=generator) for key, shape in pairs}, path)
    return path


def differs(image: np.ndarray, other: np.ndarray) -> bool:
    return np.abs(image - other).max() > 1


# What is sampled ------------------------------------------------------------------------------------------------------


def test_one_prompt_makes_one_picture_of_the_size_asked_for(generate):
    sampled = generate(f"prompt={APPLE}")
    assert {name: pixels.shape for name, pixels in sampled.items()} == {"0000.png": (32, 48, 3)}


def test_every_prompt_is_sampled_with_every_seed_and_all_in_a_grid(generate):
    sampled = generate(f"prompt=['{APPLE}','{ROCKET}']", "seed=[0,1,2]")
    assert list(sampled) == [*(f"000{number}.png" for number in range(6)), "grid.png"]
    assert sampled["grid.png"].shape[1] >= 6 * 48
    pictures = [sampled[f"000{number}.png"] for number in range(6)]
    assert all(differs(a, b) for i, a in enumerate(pictures) for b in pictures[:i])


def test_prompts_come_from_a_text_file(generate, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{APPLE}\n\n  {ROCKET} \n", encoding="utf-8")
    assert list(generate(f"prompt={tmp_path}/prompts.txt")) == ["0000.png", "0001.png", "grid.png"]
    assert parameters(tmp_path / "1" / "0001.png")["prompt"] == ROCKET


def test_a_picture_names_the_adapters_that_sampled_it(generate, adapter, tmp_path):
    generate(f"prompt={APPLE}", f"lora_path={adapter}", "lora_scale=0.5")
    (path,) = tmp_path.glob("*/0000.png")
    assert parameters(path)["lora_path"] == [str(adapter)] and parameters(path)["lora_scale"] == 0.5


def test_a_sampler_is_chosen_by_a_word(generate, tmp_path):
    plain, heun = (generate(f"prompt={APPLE}", *chosen)["0000.png"] for chosen in ([], ["sampler=heun"]))
    assert differs(plain, heun)
    named = {parameters(path)["sampler"] for path in tmp_path.glob("*/0000.png")}
    assert named == {"euler", "heun"}
    with pytest.raises(ConfigError, match=r"sampler is 'heum' \(str\); expected .*; type sampler=heun"):
        generate(f"prompt={APPLE}", "sampler=heum")


@pytest.mark.parametrize("words, lines", [(3, 1), (9, 2), (40, 2)])
def test_a_caption_stands_under_its_picture_in_at_most_two_lines(words, lines):
    white = Image.new("RGB", (128, 128), "white")
    cell = np.array(row([white], [" ".join(["rocket"] * words)]))
    assert cell.shape == (128 + LINE_HEIGHT * lines, 128, 3)
    assert all((cell[128 + LINE_HEIGHT * n :][:LINE_HEIGHT] < 128).any() for n in range(lines))


def parameters(path) -> dict:
    return json.loads(Image.open(path).text["parameters"])


def test_a_picture_carries_the_parameters_that_sample_it_again(generate, tmp_path):
    sampled = generate("prompt='„Ein roter Apfel“, 红苹果'", "seed=3", "negative_prompt=blurry")
    kept = parameters(tmp_path / "0" / "0000.png")
    assert kept["prompt"] == "„Ein roter Apfel“, 红苹果" and kept["negative_prompt"] == "blurry" and kept["seed"] == 3
    options = [f"options.{name}={kept[name]}" for name in ("cfg_scale", "num_inference_steps", "height", "width")]
    again = generate(f"prompt='{kept['prompt']}'", f"seed={kept['seed']}", "negative_prompt=blurry", *options)
    assert np.array_equal(again["0000.png"], sampled["0000.png"])


def test_a_picture_does_not_depend_on_its_company(generate):
    alone = generate(f"prompt='{ROCKET}'", "seed=1")["0000.png"]
    for batch_size in (2, 4):  # a long and a short prompt in one batch, and all four at once
        sampled = generate(f"prompt=['{APPLE}','{ROCKET}']", "seed=[0,1]", f"batch_size={batch_size}")
        assert np.abs(sampled["0003.png"] - alone).max() <= 1


# What is sampled otherwise than asked ---------------------------------------------------------------------------------


def test_a_size_that_the_model_cannot_sample_is_rounded_and_said_everywhere(generate, tmp_path, caplog):
    (pixels,) = generate(f"prompt={APPLE}", "options.height=17").values()
    (path,) = tmp_path.glob("*/0000.png")
    assert pixels.shape == (32, 48, 3) and (parameters(path)["height"], parameters(path)["width"]) == (32, 48)
    assert "A size of 48 x 17 pixels is no multiple of what the model needs; 48 x 32 are sampled." in caplog.text


def test_an_image_that_has_no_effect_is_said(generate, tmp_path, caplog):
    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")
    generate(f"prompt={APPLE}", f"input_image={tmp_path}/red.png")
    assert "input_image has no effect with denoising_strength=1" in caplog.text


def test_a_strength_without_an_image_is_said(generate, caplog):
    generate(f"prompt={APPLE}")
    assert "denoising_strength" not in caplog.text
    generate(f"prompt={APPLE}", "denoising_strength=0.5")
    assert "denoising_strength=0.5 is for something to start from; set input_image=…" in caplog.text


@pytest.mark.parametrize("mask_key", ["inpaint_mask", "+options.inpaint_mask"])
def test_an_image_and_its_mask_are_named_in_the_picture_wherever_they_are_typed(mask_key, generate, tmp_path):
    files = {name: str(tmp_path / f"{name}.png") for name in ("input_image", "inpaint_mask")}
    for file, colour in zip(files.values(), ("red", "white"), strict=True):
        Image.new("RGB", (48, 32), colour).save(file)
    generate(f"prompt={APPLE}", f"input_image={files['input_image']}", f"{mask_key}={files['inpaint_mask']}")
    (path,) = tmp_path.glob("*/0000.png")
    kept = parameters(path)
    assert {name: kept[name] for name in files} == files


# What changes it ------------------------------------------------------------------------------------------------------


def test_a_lora_changes_the_picture_as_much_as_its_scale_says(generate, adapter):
    plain, off, on = (
        generate(f"prompt={APPLE}", *overrides)["0000.png"]
        for overrides in ([], [f"lora_path={adapter}", "lora_scale=0.0"], [f"lora_path={adapter}"])
    )
    assert np.array_equal(plain, off)
    assert differs(plain, on)


def test_several_loras_add_up(generate, adapter):
    twice = generate(f"prompt={APPLE}", f"lora_path=[{adapter},{adapter}]")["0000.png"]
    doubled = generate(f"prompt={APPLE}", f"lora_path={adapter}", "lora_scale=2.0")["0000.png"]
    assert np.abs(twice - doubled).max() <= 1


def test_a_trained_adapter_is_taken_as_the_run_left_it(generate, tmp_path_factory):
    run_dir = tiny.train(tmp_path_factory.mktemp("run"), "optimizer.eps=1e-8", "optimizer.lr=0.1")
    trained = generate(f"prompt={APPLE}", f"lora_path={run_dir}/weights/epoch-0.safetensors")["0000.png"]
    assert differs(trained, generate(f"prompt={APPLE}")["0000.png"])


def test_an_input_image_is_kept_as_far_as_its_strength_says(generate):
    given = f"input_image={tiny.dataset()}/0.png"
    kept, redrawn = (generate(given, f"denoising_strength={strength}")["0000.png"] for strength in (0.1, 1.0))
    assert differs(kept, redrawn)


def test_a_fused_model_samples_what_the_adapter_samples(generate, adapter, tmp_path):
    cfg = tiny.compose("fuse", *tiny.model_overrides(), f"lora_path={adapter}", f"output={tmp_path / 'fused'}")
    (folder,) = tiny.call("fuse", cfg)
    fused, adapted = (
        generate(f"prompt={APPLE}", f"model.dit.path={folder}"),
        generate(f"prompt={APPLE}", f"lora_path={adapter}"),
    )
    assert not differs(fused["0000.png"], adapted["0000.png"])
    assert differs(fused["0000.png"], generate(f"prompt={APPLE}")["0000.png"])


def test_pictures_of_an_earlier_call_are_not_replaced_unless_that_is_asked_for(generate, tmp_path):
    output = f"output={tmp_path / 'pictures'}"
    before = generate(f"prompt={APPLE}", output)["0000.png"]
    with pytest.raises(ValueError, match="0000.png exists already.*set output=.* or overwrite=true"):
        generate(f"prompt='{ROCKET}'", output)
    assert not differs(np.array(Image.open(tmp_path / "pictures" / "0000.png"), dtype=int), before)
    assert differs(generate(f"prompt='{ROCKET}'", output, "overwrite=true")["0000.png"], before)


def test_each_job_of_a_sweep_has_a_folder_of_its_own(tmp_path, monkeypatch):
    given = [*tiny.model_overrides(), *SMALL, f"output={tmp_path}", f"prompt={APPLE}", "seed=0,1"]
    tiny.command_line(monkeypatch, "generate.py", "-m", *given)
    first, second = (np.array(Image.open(tmp_path / job / "0000.png"), dtype=int) for job in "01")
    assert differs(first, second)


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def refusal(generate, monkeypatch):
    """Says what a command is refused with; fails if it reads weights first."""
    reads = []
    monkeypatch.setattr(models, "load_weights", lambda *_, **__: reads.append("weights"))

    def message(*overrides: str) -> str:
        with pytest.raises((ValueError, OSError)) as refused:
            generate(*overrides)
        assert reads == []
        return str(refused.value)

    return message


@pytest.mark.parametrize(
    "overrides, answer",
    [
        (["prompt=[]"], "prompt is an empty list"),
        (["seed=[]"], "seed is an empty list"),
        (["seed=[0,-1]"], "seed[1] is -1 (int); expected a whole number in [0, "),
        (["prompt=FOLDER/prompts.csv"], "FOLDER/prompts.csv is a file, but prompts are read from .txt files only"),
        (["prompt=FOLDER/gone.txt"], "prompt=FOLDER/gone.txt: no such file"),
        (["input_image=FOLDER/gone.png", "denoising_strength=0.5"], "input_image=FOLDER/gone.png: not found"),
        (["inpaint_mask=FOLDER/gone.png"], "inpaint_mask=FOLDER/gone.png: not found"),
        (["denoising_strength=2"], "denoising_strength is 2 (int); expected a number in (0, 1]"),
        (["batch_size=0"], "batch_size is 0 (int)"),
        (["options.height=0"], "height is 0; expected a whole number in [1, 65535]"),
        (["options.cfg_scale=high"], "cfg_scale is 'high'; expected a number of at least 0"),
        (["options.num_inference_steps=0"], "num_inference_steps is 0; expected a whole number in [1, 10000]"),
    ],
)
def test_what_cannot_be_sampled_is_answered_with_its_key(overrides, answer, refusal, tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt\na red apple\n")
    message = refusal(*(override.replace("FOLDER", str(tmp_path)) for override in overrides))
    assert answer.replace("FOLDER", str(tmp_path)) in message and "\n" not in message


def test_an_unknown_option_is_answered_with_the_nearest(refusal):
    message = refusal("+options.cfg_scal=3")
    assert "QwenImagePipeline" in message and "'cfg_scal'" in message and "'cfg_scale'" in message


def test_a_lora_of_another_model_is_named(refusal, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"transformer.single_blocks.0.to_q.lora_A.weight": torch.zeros(4, 128)}, path)
    message = refusal(f"lora_path={path}")
    assert str(path) in message and "single_blocks.0.to_q" in message


def test_a_network_that_is_not_there_or_has_no_config_is_answered_with_its_key(refusal, tmp_path):
    gone, weights = tmp_path / "gone", tmp_path / "step-1.safetensors"
    assert refusal(f"model.dit.path={gone}").startswith(f"model.dit.path: {gone} does not exist; set it")
    save_file({"a": torch.zeros(1)}, weights)
    message = refusal(f"model.dit.path={weights}")
    assert (
        message.startswith(f"{tmp_path}/config.json not found") and "type model.dit.config=… with its path" in message
    )


@pytest.mark.parametrize("name", ["lora_path", "input_image", "prompt"])
def test_a_file_that_is_not_there_is_named(name, refusal, tmp_path):
    assert f"{tmp_path}/gone.txt" in refusal(f"{name}={tmp_path}/gone.txt")


@pytest.mark.parametrize("name", ["lora_path", "input_image"])
def test_a_file_of_another_kind_is_named(name, refusal, tmp_path):
    (tmp_path / "text.txt").write_text("neither an image nor weights")
    assert f"{tmp_path}/text.txt" in refusal(f"{name}={tmp_path}/text.txt")


def test_a_text_file_without_prompts_is_named(refusal, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert f"{tmp_path}/empty.txt holds no prompt" in refusal(f"prompt={tmp_path}/empty.txt")


def test_a_device_that_is_not_there_is_named(refusal):
    assert "device=tpu" in refusal("device=tpu")


def test_the_command_line_names_what_it_sampled(monkeypatch, capsys, tmp_path):
    overrides = tiny.merged(tiny.model_overrides(), [*SMALL, f"output={tmp_path}/sampled", f"prompt={APPLE}"])
    tiny.command_line(monkeypatch, "generate.py", *overrides)
    assert f"{tmp_path}/sampled/0000.png" in capsys.readouterr().out
