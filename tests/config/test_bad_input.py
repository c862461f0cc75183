"""Bad input ends in one clear error that names it, before any weight is read."""

import json
import math
import shutil
import sys

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffsynth.config import ConfigError
from diffsynth.config.nodes import locate
from diffsynth.core.data.prompt_dataset import prompt_dataset
from diffsynth.diffusion.loss import ConceptSlider
from diffsynth.diffusion.pipeline import networks as models
from diffsynth.diffusion.pipeline.video_media import VideoMedia
from diffsynth.diffusion.template.rows import prepare_data

RED = {"image": "0.png", "prompt": "a red emoji"}


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """Says what a run with these overrides is refused with; fails if it reads weights first."""
    reads = []
    monkeypatch.setattr(models, "load_weights", lambda *_, **__: reads.append("weights"))

    def message(*overrides: str) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as refused:
            tiny.train(tmp_path / "outputs", *overrides)
        assert reads == []
        return str(refused.value)

    return message


@pytest.fixture
def pictures(tmp_path):
    """A data set of one's own, to spoil."""
    return tiny.write_dataset(tmp_path / "pictures", count=3)


@pytest.fixture
def repository(tmp_path):
    """A model of one's own, to spoil."""
    return shutil.copytree(tiny.model(), tmp_path / "model")


# The configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, named",
    [
        ("+lora.rnak=8", ["lora.rnak", "did you mean lora.rank?"]),
        ("max_steps=ten", ["max_steps", "'ten'", "a whole number"]),
        ("lora.rank=0", ["lora.rank", "0", "at least 1"]),
        ("lora.rank=1000000", ["lora.rank is 1000000", "128, the full rank of transformer_blocks.0.", "lora.rank=128"]),
        ("lora=loha lora.rank=129", ["lora.rank is 129", "full rank"]),
        ("logger.every=0", ["logger.every", "0", "at least 1"]),
        ("max_steps=0", ["max_steps is 0", "at least 1"]),
        ("samples=0", ["samples is 0", "at least 1"]),
        ("max_grad_norm=-1", ["max_grad_norm is -1", "above 0"]),
        ("max_bad_steps=0", ["max_bad_steps is 0", "at least 1"]),
        ("data_report.pictures=-1", ["data_report.pictures is -1", "at least 0"]),
        ("export.save_steps=0", ["export.save_steps is 0", "at least 1"]),
        ("lora=loha export.formats=[comfyui]", ["export.formats: comfyui has no names for LOHA"]),
        ("lora=none export.formats=[comfyui]", ["export.formats is ['comfyui']", "in full (lora=none)"]),
        ("checkpoint.path=README.md/x", ["checkpoint.path is README.md/x", "no folder", "set checkpoint.path=…"]),
        ("device=tpu", ["device=tpu", "cpu"]),
        ("dataset.height=30", ["height=30", "multiple", "16"]),
        (
            "task.trainable_models=[unet]",
            ["no model 'unet'; set task.trainable_models to some of dit, text_encoder, vae"],
        ),
        ("task.timesteps.min_boundary=2", ["task.timesteps.min_boundary is 2", "[0, 1)"]),
        ("lora.target_modules=['*.to_q']", ["lora.target_modules: '*.to_q' is neither", "type 'to_q'"]),
        ("lora.models=[unet]", ["no model 'unet'; set lora.models to some of dit, text_encoder, vae"]),
        ("lora=none task.trainable_models=[]", ["Nothing is trained", "task.trainable_models=[dit]", "lora=lora"]),
        ("memory.checkpointing=all", ["memory.checkpointing", "'all'", "blocks"]),
    ],
)
def test_a_value_that_cannot_be_is_named(override, named, refusal):
    message = refusal(*override.split())
    assert all(part in message for part in named), message


def test_a_tracker_without_its_package_is_named(refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert 'TensorBoard needs tensorboard: pip install "diffsynth-hydra[loggers]"' in refusal("logger=tensorboard")


def test_an_option_that_validation_cannot_sample_with_is_answered_with_the_nearest(refusal):
    message = refusal("validation=base", "validation.prompts=[a red emoji]", "+validation.options.cfg_scal=1")
    assert "'cfg_scal'; did you mean 'cfg_scale'?" in message


@pytest.mark.parametrize(
    "batch_size, micro_batch_size, fitting",
    [
        (4, 3, ["batch_size=3 or 6", "1, 2, 4"]),
        (6, 4, ["batch_size=4 or 8", "1, 2, 3, 6"]),
        (0, 1, ["batch_size is 0", "[1, 1000000]"]),
    ],
)
def test_batch_sizes_that_do_not_divide_are_answered_with_those_that_do(batch_size, micro_batch_size, fitting, refusal):
    message = refusal(f"batch_size={batch_size}", f"micro_batch_size={micro_batch_size}")
    assert all(part in message for part in fitting), message


def test_prompts_in_the_place_of_images_are_answered_with_the_tasks_that_use_them(refusal, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red apple")
    cfg = tiny.compose("train", *tiny.model_overrides(), "dataset=prompts", f"dataset.path={tmp_path}/prompts.txt")
    cfg.dataset.height = cfg.dataset.width = 32
    with pytest.raises(ValueError, match=r"holds prompts without images, but FlowMatchSFT .* task=distill"):
        tiny.call("train", cfg)


def test_prompts_for_a_model_of_videos_are_refused(tmp_path):
    """Also those of a table that has a column of videos, which nothing reads as files."""
    (tmp_path / "prompts.csv").write_text("video,prompt\na.mp4,a red apple\n")
    prompts = prompt_dataset(str(tmp_path / "prompts.csv"), height=64, width=64)
    with pytest.raises(ValueError, match=r"prompts.csv holds prompts for images, but .* python train.py dataset=video"):
        prepare_data(prompts, VideoMedia(), ConceptSlider(positive="a", negative="b"), None)


def test_options_that_validation_cannot_sample_with_are_named_with_their_range(refusal):
    message = refusal("validation=base", "validation.prompts=[a red emoji]", "validation.options.num_inference_steps=0")
    assert "validation.options: num_inference_steps is 0; expected a whole number in [1, 10000]." in message


def test_a_folder_of_pictures_in_the_place_of_the_emoji_is_answered_with_what_to_choose(refusal, tmp_path):
    message = refusal(f"dataset.path={tmp_path}", "dataset.metadata=line_train.csv")
    assert f"for images of your own type dataset=image_folder dataset.path={tmp_path};" in message


# Weights --------------------------------------------------------------------------------------------------------------


def test_weights_that_are_nowhere_are_named_with_the_places_looked_in(refusal, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "1")
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "weights"))
    hub = [f"model.{name}.path=null" for name in tiny.COMPONENTS]
    message = refusal("model=qwen_image", *hub)
    assert "transformer/diffusion_pytorch_model*.safetensors" in message
    assert str(tmp_path / "weights" / "Qwen" / "Qwen-Image") in message
    assert "DIFFSYNTH_MODEL_BASE_PATH" in message and "DIFFSYNTH_SKIP_DOWNLOAD" in message


def test_a_folder_of_weights_that_does_not_exist_is_named(refusal, tmp_path):
    assert f"{tmp_path}/nowhere does not exist" in refusal(f"model.dit.path={tmp_path}/nowhere")


def test_a_folder_in_the_place_of_a_file_is_answered_with_its_newest_file(refusal, tmp_path):
    newest = tmp_path / "run" / "weights" / "step-2.safetensors"
    newest.parent.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, newest)
    assert f"run is a folder; expected a file, such as {newest}." in refusal(f"lora.checkpoint={tmp_path}/run")
    assert f"{tmp_path}/none.safetensors does not exist" in refusal(f"lora.checkpoint={tmp_path}/none.safetensors")
    assert f"did you mean {newest}?" in refusal(f"lora.checkpoint={newest.with_suffix('.safetensor')}")


def test_a_missing_shard_is_named(refusal, repository):
    file = repository / "transformer" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    message = refusal(f"model.dit.path={repository}/transformer")
    assert "missing" in message and "diffusion_pytorch_model-00002-of-00002.safetensors" in message


def test_a_truncated_file_is_named_with_its_size_and_the_expected_one(refusal, repository):
    file = repository / "vae" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1000])
    message = refusal(f"model.vae.path={repository}/vae")
    assert f"{file} has {len(content) - 1000} bytes, expected {len(content)}" in message


def test_weights_of_another_size_are_named_with_both_shapes(refusal, repository):
    file = repository / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"img_in.weight": torch.zeros(128, 32)}, file)
    message = refusal(f"model.dit.path={repository}/transformer")
    assert f"img_in.weight in {file} has shape [128, 32], expected [128, 64]" in message


def test_weights_of_another_architecture_are_named(refusal, repository):
    file = repository / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({"down_blocks.0.weight": torch.zeros(2)}, file)
    message = refusal(f"model.dit.path={repository}/transformer")
    assert f"down_blocks.0.weight in {file} is unexpected" in message
    assert "time_text_embed.timestep_embedder.linear_1.weight is missing" in message


def test_a_model_in_the_place_of_another_is_named(refusal):
    message = refusal(f"model.dit.path={tiny.model()}/vae")
    assert f"{tiny.model()}/vae/" in message and "QwenImageVAE" in message


def test_an_input_that_the_pipeline_does_not_take_is_named(refusal, pictures):
    tiny.write_rows(pictures, [RED | {"depth": "0.png"}])
    message = refusal(f"dataset.path={pictures}", "task.extra_inputs=[depth]")
    assert "task.extra_inputs: QwenImagePipeline has no input 'depth'" in message and "input_image" in message


# Adapters -------------------------------------------------------------------------------------------------------------


def test_a_lora_target_that_matches_nothing_is_answered_with_the_nearest(refusal):
    message = refusal("lora.target_modules=[to_q,to_kk]")
    assert "lora.target_modules" in message and "['to_kk']" in message and "Did you mean 'to_k'?" in message


def adapter(path, layer: str, rank: int = 4, width: int = 128):
    pair = {"lora_A": torch.zeros(rank, width), "lora_B": torch.zeros(width, rank)}
    save_file({f"transformer.{layer}.{part}.weight": tensor for part, tensor in pair.items()}, path)
    return path


@pytest.mark.parametrize("key", ["lora.checkpoint", "lora.preset"])
def test_a_lora_of_another_model_is_named_with_the_key_that_does_not_fit(key, refusal, tmp_path):
    path = adapter(tmp_path / "flux.safetensors", "single_transformer_blocks.0.attn.to_q")
    message = refusal(f"{key}={path}")
    assert str(path) in message and "single_transformer_blocks.0.attn.to_q" in message
    assert "the nearest name is" in message and "choose an adapter that was made for this model" in message


def test_a_lora_of_another_width_is_named_with_both(refusal, tmp_path):
    path = adapter(tmp_path / "wide.safetensors", "transformer_blocks.0.attn.to_q", width=3072)
    message = refusal(f"lora.checkpoint={path}")
    assert str(path) in message and "(4, 3072)" in message and "128" in message


def test_a_lora_file_that_breaks_off_is_named(refusal, tmp_path):
    path = adapter(tmp_path / "half.safetensors", "transformer_blocks.0.attn.to_q")
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} has" in refusal(f"lora.checkpoint={path}")


def test_a_lora_file_that_does_not_exist_is_named(refusal, tmp_path):
    assert f"{tmp_path}/gone.safetensors" in refusal(f"lora.checkpoint={tmp_path}/gone.safetensors")


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, named",
    [
        ({"image": "gone.png"}, ["image 'gone.png'", "not found"]),
        ({"image": "text.png"}, ["image 'text.png'", "not an image"]),
        ({"image": ""}, ["image is empty"]),
        ({"image": math.nan}, ["image 'nan'", "not found"]),
        ({"prompt": ""}, ["prompt is empty"]),
        ({"prompt": "   "}, ["prompt is empty"]),
        ({"image": "/etc/passwd"}, ["image '/etc/passwd'", "leads out of"]),
        ({"image": "../secret.png"}, ["image '../secret.png'", "leads out of"]),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_number_and_file(row, named, refusal, pictures):
    (pictures / "text.png").write_text("no picture")
    tiny.write_rows(pictures, [RED, RED | row, RED])
    message = refusal(f"dataset.path={pictures}")
    assert all(part in message for part in [f"1 of 3 rows of {pictures}/metadata.csv", "row 2:", *named]), message


def test_an_error_of_the_disk_is_not_one_of_the_name_that_is_imported(tmp_path, monkeypatch):
    (tmp_path / "full_disk.py").write_text("raise OSError(28, 'No space left on device')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OSError, match="No space left on device"):
        locate("full_disk.Model", "model")


def test_a_column_that_the_task_needs_is_asked_for(refusal, pictures):
    tiny.write_rows(pictures, [{"photo": "0.png", "prompt": "a red emoji"}])
    assert "row 1: has no image, but photo, prompt" in refusal(f"dataset.path={pictures}")


def test_a_column_of_extra_inputs_is_asked_for(refusal):
    assert "row 1: has no inpaint_mask, but image, prompt" in refusal("task.extra_inputs=[inpaint_mask]")


def test_an_image_smaller_than_one_patch_is_named(refusal, pictures):
    Image.new("RGB", (8, 8)).save(pictures / "1.png")
    message = refusal(f"dataset.path={pictures}", "dataset.height=null", "dataset.width=null")
    assert "row 2: image '1.png'" in message and "8x8" in message and "16x16" in message


def test_a_row_that_validation_cannot_use_is_named(refusal, pictures):
    (pictures / "1.png").unlink()
    node = f"{{_target_: diffsynth.core.data.UnifiedDataset.from_folder, path: {pictures}}}"
    message = refusal("validation=base", f"+validation.datasets.mine={node}")
    assert "row 2: image '1.png'" in message


def test_a_data_set_without_metadata_is_named(refusal, tmp_path):
    message = refusal(f"dataset.path={tmp_path}", "dataset.metadata=null")
    assert f"{tmp_path}/metadata.csv" in message and "dataset.metadata" in message


def test_a_picture_that_breaks_off_is_named_when_its_turn_comes(pictures, tmp_path):
    """Only decoding can tell, and decoding everything first would take hours on a large data set."""
    truncate(pictures / "1.png")
    with pytest.raises(ValueError, match=r"row 2: image '1\.png'.*dataset\.on_error=skip"):
        tiny.train(tmp_path / "outputs", f"dataset.path={pictures}", "batch_size=3")


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


def test_rows_that_cannot_be_used_are_skipped_counted_and_listed(pictures, tmp_path, caplog):
    truncate(pictures / "2.png")
    tiny.write_rows(pictures, [RED, RED | {"image": "gone.png"}, RED | {"image": "2.png"}, RED | {"prompt": ""}])
    run_dir = tiny.train(tmp_path / "outputs", f"dataset.path={pictures}", "dataset.on_error=skip")
    listed = [json.loads(line) for line in (run_dir / "skipped.jsonl").read_text().splitlines()]
    assert [(row["row"], row["file"]) for row in listed] == [(2, "gone.png"), (4, None), (3, "2.png")]
    assert f"2 of 4 rows of {pictures}/metadata.csv are skipped" in caplog.text  # before the first step
    assert f"3 of 4 rows of {pictures}/metadata.csv are skipped; {run_dir}/skipped.jsonl lists them" in caplog.text
    assert len(tiny.metrics(run_dir)) == 2


def test_a_mistake_is_answered_in_one_line_without_a_traceback(monkeypatch, pictures, tmp_path):
    tiny.write_rows(pictures, [RED | {"prompt": ""}])
    overrides = tiny.merged(tiny.train_overrides(tmp_path), [f"dataset.path={pictures}"])
    with pytest.raises(SystemExit) as exit:
        tiny.command_line(monkeypatch, "train.py", *overrides)
    assert str(exit.value).startswith("error: 1 of 1 rows of") and "row 1: prompt is empty" in str(exit.value)


def test_configuration_errors_are_value_errors():
    assert issubclass(ConfigError, ValueError)
