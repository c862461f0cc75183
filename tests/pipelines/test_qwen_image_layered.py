"""Qwen-Image-Layered: what diffusers samples, layers as media, training on lists of layers, what is refused."""

import json

import numpy as np
import pytest
import tiny
import torch
from miniatures import qwen_image_layered
from PIL import Image
from torch.testing import assert_close

from diffsynth.cache.make import launch_data_process_task
from diffsynth.core.data import CachedDataset, Sample, UnifiedDataset
from diffsynth.core.loader import ModelConfig
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.diffusion.pipeline.media import composite
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.pipelines.qwen_image_layered import QwenImageLayeredPipeline, qwen_image_layered_sigmas
from diffsynth.training.accelerator import make_accelerator

COLUMNS = ["layer_input_image"]


def picture(number: int, size: tuple[int, int] = (32, 48)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
    return Image.fromarray(pixels)


REQUEST = {
    "prompt": "a red apple", "negative_prompt": "a line emoji", "layer_input_image": picture(0, (64, 96)),
    "layer_num": 2, "height": 48, "width": 32, "num_inference_steps": 3, "seed": 1, "cfg_scale": 1.0,
}  # fmt: skip


def built(**parts: str) -> QwenImageLayeredPipeline:
    folder = qwen_image_layered.folder()
    configs = {name: ModelConfig(path=str(folder / part)) for name, part in (tiny.COMPONENTS | parts).items()}
    pipe = QwenImageLayeredPipeline.from_components(**configs, torch_dtype="float32")
    pipe.progress_bar = iter
    return pipe


@pytest.fixture(scope="module")
def pipe() -> QwenImageLayeredPipeline:
    pipe = built()
    pipe.load_models()
    return pipe


@pytest.mark.parametrize("guidance", tiny.mostly_slow([1.0, 3.0], 3.0))
def test_it_samples_what_diffusers_samples(guidance, pipe):
    request = REQUEST | {"cfg_scale": guidance}
    shared, posi, nega = pipe.prepare([request])
    with torch.no_grad():
        found = pipe.denoise(shared, posi, nega)
    assert found.shape == (1, 3, 16, 6, 4)
    assert_close(found, qwen_image_layered.sampled_by_diffusers(request, shared["noise"]), atol=1e-4, rtol=0)


def test_its_noise_levels_are_those_of_the_square_root_of_tokens():
    linear = torch.tensor([1.0, 0.5])
    expected = 4.0 / (4.0 + 1 / linear - 1)  # exp(μ) = 4
    expected = 1 - (1 - expected) * (1 - 0.02) / (1 - expected[-1])
    mu = np.log(4)
    assert_close(qwen_image_layered_sigmas(2, dynamic_shift_len=round(256 * mu**2)), expected, atol=1e-3, rtol=0)
    assert_close(qwen_image_layered_sigmas(2, exponential_shift_mu=mu), expected)
    assert_close(qwen_image_layered_sigmas(2), qwen_image_layered_sigmas(2, exponential_shift_mu=0.8))


def test_a_sample_is_its_layers_which_are_written_beside_their_composite(pipe, tmp_path):
    layers = pipe(**REQUEST, progress_bar_cmd=iter)
    assert [(layer.mode, layer.size) for layer in layers] == [("RGBA", (32, 48))] * 2
    pipe.media.write(layers, tmp_path / "0000.png", {"prompt": "a"})
    files = {path.name: Image.open(path) for path in sorted(tmp_path.iterdir())}
    assert list(files) == ["0000.png", "0000_1.png", "0000_2.png"] and "prompt" in files["0000.png"].text["parameters"]
    assert files["0000_2.png"].tobytes() == layers[1].tobytes()
    assert files["0000.png"].tobytes() == Image.alpha_composite(*layers).tobytes()
    assert pipe.media.thumbnail(layers).mode == "RGB"


def test_the_front_layer_covers_what_is_behind_it():
    back, front = Image.new("RGBA", (2, 1), "red"), Image.new("RGBA", (2, 1))
    front.putpixel((1, 0), (0, 0, 255, 255))
    assert list(composite([back, front]).getdata()) == [(255, 0, 0, 255), (0, 0, 255, 255)]


@pytest.fixture
def dataset(tmp_path) -> UnifiedDataset:
    """Rows of lists of three images, and of one to decompose."""
    for number in range(8):
        picture(number).save(tmp_path / f"{number}.png")
    rows = [
        {
            "image": [f"{n}.png", f"{n + 1}.png", f"{n + 2}.png"],
            "layer_input_image": f"{n}.png",
            "prompt": "red " * (n + 1),
        }
        for n in range(2)
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = UnifiedDataset.from_folder(
        str(tmp_path), "metadata.jsonl", height=48, width=32, data_file_keys=["image", *COLUMNS]
    )
    dataset.read_images_in(QwenImageLayeredPipeline.media.mode)
    dataset.scan(required=("image", "prompt", *COLUMNS))
    return dataset


def training() -> PipelineTrainingModule:
    task = FlowMatchSFT(trainable_models=["dit"], extra_inputs=COLUMNS)
    return PipelineTrainingModule(built(), task)


def samples(dataset) -> list[Sample]:
    return [Sample(dataset[number], epoch=0, index=number) for number in range(2)]


def test_a_batch_of_lists_of_images_is_its_samples(dataset):
    module, batch = training().load(), samples(dataset)
    losses = module(batch)
    assert_close(losses, torch.cat([module([sample]) for sample in batch]), rtol=1e-4, atol=1e-5)
    losses.mean().backward()
    without = [name for name, p in module.pipe.dit.named_parameters() if p.grad is None]
    assert all(name.startswith("transformer_blocks.1.") for name in without)  # its text goes nowhere


@pytest.mark.slow
def test_a_cache_holds_lists_of_images(dataset, tmp_path):
    launch_data_process_task(make_accelerator("cpu", "float32"), dataset, training(), tmp_path / "cache")
    module = training().load(cached=True)
    cached = module(samples(CachedDataset(str(tmp_path / "cache"))))
    assert module.pipe.vae is None
    assert_close(cached, training().load()(samples(dataset)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer_input_image": None}, "layer_input_image has 0 images, expected the one to decompose; give it"),
        ({"input_image": picture(0), "denoising_strength": 0.5}, "input_image is <PIL.*expected a list: the composite"),
        ({"input_image": [picture(0)], "inpaint_mask": Image.new("L", (32, 48))}, "samples whole layers; leave it out"),
        ({"layer_num": 0}, "layer_num is 0; expected a whole number of at least 1"),
    ],
)
def test_requests_that_it_cannot_sample_are_refused(change, message, pipe):
    with pytest.raises(ValueError, match=message):
        pipe.prepare([REQUEST | change])


@pytest.mark.parametrize(
    "part, message", [("dit", "use_layer3d_rope or use_additional_t_cond false"), ("vae", "vae has 3 channels")]
)
def test_parts_of_qwen_image_are_refused_before_weights_are_read(part, message, no_weights_are_read):
    with pytest.raises(ValueError, match=message):
        built(**{part: str(tiny.model() / tiny.COMPONENTS[part])}).load_models()


def test_layers_to_start_from_are_noised_to_the_first_level(pipe):
    layers = [picture(number, (64, 96)) for number in range(3)]
    shared, _, _ = pipe.prepare([REQUEST | {"input_image": layers, "denoising_strength": 0.5}])
    sigma = pipe.scheduler.sigmas[0]
    assert 0 < sigma < 0.9
    assert_close(shared["latents"], (1 - sigma) * shared["input_latents"] + sigma * shared["noise"])
