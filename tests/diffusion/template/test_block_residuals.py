"""What templates add after blocks of the transformer, and the Blockwise ControlNet that ships."""

from functools import cache

import numpy as np
import pytest
import templates
import tiny
import torch
from diffusers import QwenImageTransformer2DModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth.core.loader import ModelConfig
from diffsynth.diffusion.template import TemplatePipeline, residuals
from diffsynth.diffusion.template.code import read_code
from diffsynth.diffusion.template.model import load_template
from diffsynth.pipelines.networks.qwen_image import use_joint_attention

CODE = (tiny.ROOT / "models" / "templates" / "blockwise_controlnet" / "model.py").read_text(encoding="utf-8")
RELEASED = 'TEMPLATE_MODEL_CONFIG = {"blocks": 60, "width": 3072, "inpaint": False}'
SIZE = {"height": 48, "width": 32, "num_inference_steps": 2, "seed": 0, "cfg_scale": 1, "progress_bar_cmd": iter}
PROMPT = "a red apple"


def picture(seed: int = 0, size: tuple[int, int] = (32, 48)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def write(tmp_path):
    """Writes the Blockwise ControlNet for the miniature, with random weights; returns its folder."""

    def folder(name: str = "template", inpaint: bool = False, **config):
        config = {"blocks": 4, "width": 128, "inpaint": inpaint} | config
        path = templates.write(tmp_path / name, CODE, (RELEASED, f"TEMPLATE_MODEL_CONFIG = {config}"))
        model = load_template(read_code(path)).model
        generator = torch.Generator().manual_seed(len(name))
        random = {n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in model.state_dict().items()}
        save_file(random, path / "model.safetensors")
        return templates.write(
            path,
            (path / "model.py").read_text(),
            ("TEMPLATE_MODEL_PATH = None", "TEMPLATE_MODEL_PATH = 'model.safetensors'"),
        )

    return folder


def loaded(*folders) -> TemplatePipeline:
    return TemplatePipeline(torch.float32, model_configs=[ModelConfig(path=str(folder)) for folder in folders])


class AddedByHand(nn.Module):
    """A block of the transformer, after which DiffSynth-Studio's loop adds the ControlNet's output."""

    def __init__(self, block: nn.Module, control: nn.Module, condition: Tensor, scale: float):
        super().__init__()
        self.block, self.control, self.condition, self.scale = block, [control], condition, scale

    def forward(self, *args, **kwargs):
        text, image = self.block(*args, **kwargs)
        count = self.condition.shape[1]
        x, y, control = image[:, :count].clone(), self.condition, self.control[0]
        norm = lambda t, weight: t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-6) * weight  # noqa: E731
        hidden = control.input_proj(norm(x, control.x_rms.weight) + norm(y, control.y_rms.weight))
        hidden = control.output_proj(0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)))
        image = image.clone()
        image[:, :count] = x + self.scale * hidden
        return text, image


@torch.no_grad()
def test_it_adds_after_every_block_what_the_equation_says_and_not_to_edit_images(pipe, write):
    template = loaded(write())
    given = template.arguments(pipe, [{"image": picture(), "scale": 0.7}], size={"height": 48, "width": 32})
    generator = torch.Generator().manual_seed(0)
    latents, edit, text = (
        torch.randn(shape, generator=generator) for shape in ((1, 16, 6, 4), (1, 16, 4, 8), (1, 5, 128))
    )
    inputs = {"latents": latents, "edit_latents": [edit], "prompt_emb": text, "prompt_emb_mask": None}
    inputs |= {"dit": pipe.dit, "timestep": torch.tensor([500.0])}
    _, posi, _ = pipe.split_request(pipe.complete({"prompt": PROMPT, **given}))
    found, plain = (pipe.model_fn(**inputs, block_residuals=own) for own in ([posi["block_residuals"]], None))
    model = template.models[0]
    pixels = pipe.vae.encode(pipe.preprocess_image(picture()))[0]
    tokens = torch.stack(
        [pixels[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten() for y in range(3) for x in range(2)]
    )
    condition = model.img_in(tokens)[None]
    pairs = zip(pipe.dit.transformer_blocks, model.controlnet_blocks, strict=True)
    pipe.dit.transformer_blocks = nn.ModuleList(AddedByHand(*pair, condition, 0.7) for pair in pairs)
    expected = pipe.model_fn(**inputs)
    assert torch.allclose(found, expected, atol=1e-5) and (found - plain).abs().max() > 1e-2


def test_its_names_are_the_released_ones():
    code = read_code(tiny.ROOT / "models" / "templates" / "blockwise_controlnet")
    with torch.device("meta"):
        model = code.model(**code.config)
    layers = {"x_rms.weight": (3072,), "y_rms.weight": (3072,)}
    layers |= {
        f"{name}_proj.{kind}": (3072, 3072)[: 1 + (kind == "weight")]
        for name in ("input", "output")
        for kind in ("weight", "bias")
    }
    expected = {f"controlnet_blocks.{block}.{name}": shape for block in range(60) for name, shape in layers.items()}
    expected |= {"img_in.weight": (3072, 64), "img_in.bias": (3072,)}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected


def test_before_the_training_it_changes_nothing(pipe, write, tmp_path):
    templates.write(tmp_path / "new", CODE, (RELEASED, "TEMPLATE_MODEL_CONFIG = {'blocks': 4, 'width': 128}"))
    plain = pipe(PROMPT, **SIZE)
    started, trained = (
        loaded(folder)(pipe, [{"image": picture()}], prompt=PROMPT, **SIZE) for folder in (tmp_path / "new", write())
    )
    assert started.tobytes() == plain.tobytes() != trained.tobytes()


@pytest.mark.slow
def test_several_add_up_and_a_scale_of_zero_is_none(pipe, write):
    both = loaded(write(), write("other"))
    image = {"image": picture()}
    calls = {
        "first": [image], "second": [image | {"model_id": 1}],
        "both": [image, image | {"model_id": 1}], "one": [image, image | {"model_id": 1, "scale": 0}],
    }  # fmt: skip
    sampled = {name: both(pipe, own, prompt=PROMPT, **SIZE).tobytes() for name, own in calls.items()}
    assert sampled["one"] == sampled["first"] and len(set(sampled.values())) == 3


@pytest.mark.slow
def test_requests_of_a_batch_have_their_own_images(pipe, write):
    template, options = loaded(write()), {name: value for name, value in SIZE.items() if name != "progress_bar_cmd"}
    size = {"height": 48, "width": 32}
    requests = [
        {"prompt": PROMPT, **template.arguments(pipe, [{"image": picture(seed)}], size=size), **options}
        for seed in (0, 1)
    ]
    for image, request in zip(pipe.generate(requests), requests, strict=True):
        assert np.abs(np.array(image, dtype=int) - np.array(pipe.generate([request])[0], dtype=int)).max() <= 1
    with pytest.raises(ValueError, match="differ in layers, scale .*set micro_batch_size=1"):
        other = template.arguments(pipe, [{"image": picture(), "scale": 0.1}], size=size)
        pipe.generate([requests[0], requests[1] | other])


def test_to_inpaint_it_reads_the_mask_and_not_what_is_below(pipe, write):
    mask = Image.new("L", (32, 48))
    mask.paste(255, (0, 0, 16, 48))
    model = loaded(write(inpaint=True)).models[0]
    images = picture(), picture()
    images[1].paste("red", (0, 0, 16, 48))
    found = [model.process_inputs(image, pipe, 48, 32, mask=mask)["latents"] for image in images]
    assert torch.equal(*found) and found[0].shape == (1, 17, 6, 4)
    assert found[0][0, 16].tolist() == [[0, 0, 1, 1]] * 6
    with pytest.raises(ValueError, match="mask is None, but this ControlNet has inpaint=True"):
        model.process_inputs(images[0], pipe, 48, 32)


@cache
def network() -> QwenImageTransformer2DModel:
    with torch.device("meta"):
        dit = QwenImageTransformer2DModel(num_layers=4, attention_head_dim=32, num_attention_heads=4)
    use_joint_attention(dit)
    return dit


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer": {}}, "block_residuals has layers, condition, layer; expected a dict of layers"),
        ({"layers": {"block_0": 1}}, "has layers dict, expected a dict of modules by block"),
        ({"layers": {"block_4": nn.Identity()}}, "has 'block_4', which is no block of QwenImageTransformer2DModel"),
        ({"scale": "1"}, "has scale '1', expected a number"),
        ({"condition": torch.zeros(1, 6, 64)}, r"has condition \(1, 6, 64\), expected a tensor of \(1, length, 128\)"),
        ({"condition": torch.full((1, 6, 128), torch.nan)}, "condition of block_residuals holds NaN"),
    ],
)
def test_residuals_that_the_transformer_cannot_add_are_refused(change, message):
    value = {"layers": {"block_0": nn.Identity()}, "condition": torch.zeros(1, 6, 128)} | change
    with pytest.raises(ValueError, match=message):
        residuals.read(value, network(), "a template")


def test_residuals_for_another_size_are_refused():
    own = residuals.BlockResiduals({"block_0": nn.Identity()}, torch.zeros(1, 5, 128))
    with (
        pytest.raises(ValueError, match="a condition of 5 tokens, but the image has 6; make it of the sample's"),
        residuals.added(network(), [[own]], own=6, tokens=6),
    ):
        pass
