"""What sampling from the command line keeps in memory, and that saving memory does not change what is sampled."""

import numpy as np
import pytest
import templates
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from diffsynth.config import build
from diffsynth.core.live_bytes import LiveBytes, bytes_of
from diffsynth.diffusion.base_pipeline import BasePipeline
from diffsynth.diffusion.pipeline import networks
from diffsynth.diffusion.pipeline.units import PipelineUnitRunner
from diffsynth.diffusion.template import Templates

PROMPTS = ["a red apple", "a rocket, flying"]
SIZE = {"num_inference_steps": 1, "height": 32, "width": 32}
SMALL = [
    *(f"options.{name}={value}" for name, value in SIZE.items()),
    f"prompt={PROMPTS}",
    "device=cpu",
    "batch_size=1",
]
STREAMED = ["memory.stream_blocks=3", "memory.stream_buffers=1"]  # of four blocks
INPUTS = 100_000  # bytes; those of two small images take less

# Reads weights of the network, by its name or by way of the pipeline, and moves the noise levels by them.
READS_NETWORK = """
import torch


class Template(torch.nn.Module):
    def process_inputs(self, pipe, **kwargs):
        return {{"weight": {network}.transformer_blocks[0].attn.to_v.weight.abs().mean()}}

    def forward(self, weight, **kwargs):
        return {{"exponential_shift_mu": 100 * weight.item()}}


TEMPLATE_MODEL = Template
TEMPLATE_MODEL_PATH = None
"""


def built(*overrides: str) -> BasePipeline:
    return build(tiny.compose("generate", *tiny.model_overrides(), *overrides))["model"](device="cpu")


def loaded() -> BasePipeline:
    pipe = built()
    pipe.load_models()
    pipe.progress_bar = iter
    return pipe


def requests() -> list[dict]:
    return [{"prompt": prompt, "seed": 0, **SIZE} for prompt in PROMPTS]


@pytest.fixture
def generate(tmp_path):
    """Samples both prompts with these overrides, and returns their pixels."""

    def sample(*overrides: str) -> list[np.ndarray]:
        output = tmp_path / f"sampled-{len(list(tmp_path.iterdir()))}"
        cfg = tiny.compose("generate", *tiny.model_overrides(), *SMALL, f"output={output}", *overrides)
        return [np.array(Image.open(path), dtype=int) for path in tiny.call("generate", cfg)[:-1]]

    return sample


@pytest.fixture
def style(tmp_path):
    """A LoRA file that changes the network and the text encoder."""
    generator = torch.Generator().manual_seed(0)
    pipe, tensors = built(), {}
    for name in ("dit", "text_encoder"):
        layers = {n: m for n, m in getattr(pipe, name).named_modules() if n.endswith(("to_v", "v_proj"))}
        for layer, module in layers.items():
            key = f"{pipe.lora_prefixes[name]}.{layer}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, module.in_features, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(module.out_features, 4, generator=generator)
    save_file(tensors, path := tmp_path / "style.safetensors")
    return path


# What is in memory ----------------------------------------------------------------------------------------------------


@pytest.fixture
def in_memory(monkeypatch):
    """Lists what is in memory when units run ("encode") and before networks predict ("denoise"): models, and bytes."""
    moments, live = [], LiveBytes()

    def watch(owner: type, method: str, what: str) -> None:
        real = getattr(owner, method)

        def watched(*args, **kwargs):
            pipe = next(each for each in args if isinstance(each, BasePipeline))
            models = {name for name in pipe.built_models if not next(getattr(pipe, name).parameters()).is_meta}
            moments.append((what, models, live.device.now))
            live.restart()
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, method, watched)

    watch(PipelineUnitRunner, "__call__", "encode")
    watch(BasePipeline, "denoise", "denoise")
    return moments, live


def test_encoders_are_dropped_before_the_network_is_loaded(generate, in_memory):
    moments, _ = in_memory
    generate()
    models = {what: [own for kind, own, _ in moments if kind == what] for what in ("encode", "denoise")}
    assert all(own == {"text_encoder", "vae"} for own in models["encode"])
    assert models["denoise"] == [{"dit", "vae"}] * 2
    assert [what for what, *_ in moments[-2:]] == ["denoise", "denoise"]  # both batches were encoded before


def test_sampling_takes_the_stored_network_and_the_autoencoder(generate, in_memory):
    moments, live = in_memory
    with LiveBytes() as expected:
        pipe = built()
        pipe.read_weights({"dit", "vae"}, storages={"dit": "int8"})
        pipe.drop_models({"text_encoder"})
    with live:
        generate("memory.storage=int8", "memory.stored=[dit]")
    (what, _, at_rest), peak = moments[-1], live.device.peak
    assert what == "denoise" and at_rest < expected.device.now + INPUTS
    assert peak < sum(bytes_of(model.parameters()) for model in (loaded().dit, pipe.vae))


def test_streamed_blocks_are_in_host_memory(generate, in_memory):
    moments, live = in_memory
    pipe = loaded()
    with live:
        generate(*STREAMED)
    block, rest = bytes_of(pipe.dit.transformer_blocks[0].parameters()), bytes_of(pipe.vae.parameters())
    assert live.host.peak >= 3 * block
    assert moments[-1][2] < bytes_of(pipe.dit.parameters()) - block + rest  # two of four blocks' worth, and constants


# What is sampled ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [[], STREAMED], ids=["in turn", "streamed"])
def test_pictures_are_those_of_a_pipeline_with_all_models(overrides, generate):
    together = [np.array(loaded().generate([request])[0], dtype=int) for request in requests()]
    assert np.array_equal(generate(*overrides), together)


def test_an_adapter_is_added_beside_weights_that_are_stored_and_streamed(generate, style):
    saving, adapter = ["memory.storage=int8", *STREAMED], f"lora_path={style}"
    without, plain, adapted = map(np.array, (generate(*saving), generate(adapter), generate(*saving, adapter)))
    assert np.abs(adapted - plain).mean() < np.abs(adapted - without).mean() / 10


def test_an_adapter_of_an_encoder_is_added_before_prompts_are_encoded(generate, style):
    pipe = loaded()
    pipe.load_adapter(style)
    together = [np.array(pipe.generate([request])[0], dtype=int) for request in requests()]
    assert np.array_equal(generate(f"lora_path={style}"), together)


@pytest.mark.parametrize("network", ["pipe.dit", "pipe.network"])
def test_a_template_may_read_the_network(network, generate, tmp_path):
    folder = templates.write(tmp_path / "reads", READS_NETWORK.format(network=network))
    pipe = loaded()
    arguments = Templates(path=str(folder)).load_all(pipe).arguments(pipe, [{}])
    together = [np.array(pipe.generate([{**request, **arguments}])[0], dtype=int) for request in requests()]
    chosen = [f"template.path={folder}", "template_inputs=[{}]"]
    assert np.array_equal(generate(*chosen), together)


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, message",
    [
        ("memory.stream_blocks=9", "memory.stream_blocks=9: of the 4 repeated blocks"),
        ("memory.stream_blocks=2", "memory.stream_blocks=2 with memory.stream_buffers=2 saves nothing"),
        ("memory.stored=[dit]", "memory.stored names .* but memory.storage is none"),
        ("memory={storage:int8,stored:[vae2]}", "there is no model 'vae2'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_weights_are_read(override, message, generate, monkeypatch):
    monkeypatch.setattr(networks, "load_weights", None)
    with pytest.raises(ValueError, match=message):
        generate(override)


def test_a_setting_of_trainings_is_refused_with_its_name(monkeypatch):
    message = tiny.complaint(monkeypatch, "memory.checkpointing=blocks", script="generate.py")
    assert "memory.checkpointing: no such key 'checkpointing'" in message
