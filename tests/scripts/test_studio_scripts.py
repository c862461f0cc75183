"""Names and calls in the scripts of DiffSynth-Studio's users (its `examples/` and guides) do what they do there."""

import pytest
import templates
import torch
from safetensors.torch import save_file

from diffsynth.core.data import CachedDataset, UnifiedDataset
from diffsynth.core.loader import ModelConfig
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.diffusion.template import TemplatePipeline
from diffsynth.diffusion.template.source import find_template

LAYER = "transformer_blocks.0.attn.to_v"
TEMPLATE = templates.FROZEN_PART


def test_their_imports_work():
    from diffsynth import ModelConfig, load_state_dict
    from diffsynth.core import UnifiedDataset
    from diffsynth.core import load_state_dict as of_core
    from diffsynth.core.data import SequencialProcess, SequentialProcess
    from diffsynth.diffusion import DirectDistillLoss, FlowMatchSFTLoss, launch_data_process_task, launch_training_task
    from diffsynth.diffusion.template import load_state_dict as of_templates

    assert load_state_dict is of_core is of_templates and SequencialProcess is SequentialProcess
    assert all([ModelConfig, UnifiedDataset, DirectDistillLoss, FlowMatchSFTLoss])
    assert all([launch_data_process_task, launch_training_task])


def test_a_name_that_does_not_exist_is_an_attribute_error():
    import diffsynth

    with pytest.raises(AttributeError, match="no attribute 'load_model_with_disk_offload'"):
        diffsynth.load_model_with_disk_offload  # noqa: B018


@pytest.fixture
def lora(tmp_path) -> ModelConfig:
    shapes = {"A": (2, 128), "B": (128, 2)}
    save_file(
        {f"{LAYER}.lora_{part}.default.weight": torch.ones(shape) for part, shape in shapes.items()},
        tmp_path / "epoch-0.safetensors",
    )
    return ModelConfig(path=str(tmp_path / "epoch-0.safetensors"))


def sampled(pipe) -> torch.Tensor:
    layer = pipe.dit.get_submodule(LAYER)
    return layer(torch.ones(1, 128, dtype=pipe.torch_dtype))


@pytest.mark.parametrize("hotload", [None, True, False])
def test_a_lora_is_loaded_and_cleared_as_there(hotload, lora, pipe):
    before = sampled(pipe)
    pipe.load_lora(pipe.dit, lora, alpha=0.5, hotload=hotload)
    torch.testing.assert_close(sampled(pipe), before + 128, rtol=1e-3, atol=1e-3)  # 0.5 · B A x, B and A of rank 2
    pipe.clear_lora()
    assert torch.equal(sampled(pipe), before) == (hotload is not False)  # what is merged stays


def test_the_networks_of_templates_are_a_list(tmp_path):
    folder = templates.write(tmp_path / "template", TEMPLATE)
    pipeline = TemplatePipeline.from_pretrained(model_configs=[ModelConfig(path=str(folder))])
    weights = {name: torch.ones_like(tensor) for name, tensor in pipeline.models[0].state_dict().items()}
    pipeline.models[0].load_state_dict(weights)
    assert pipeline.models[0].mlp.weight.unique().tolist() == [1]
    lazy = TemplatePipeline.from_pretrained(model_configs=[ModelConfig(path=str(folder))], lazy_loading=True)
    with pytest.raises(ValueError, match="set lazy_loading=False"):
        lazy.models  # noqa: B018


def test_templates_are_found_below_the_folder_of_models(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "1")
    folder = templates.write(tmp_path / "models" / "studio" / "Template-A", TEMPLATE)
    assert find_template(ModelConfig(path="studio/Template-A")) == folder
    assert find_template(ModelConfig(model_id="studio/Template-A", trust_remote_code=True)) == folder
    with pytest.raises(ValueError, match="trust_remote_code is false"):
        find_template(ModelConfig(model_id="studio/Template-A"))
    with pytest.raises(FileNotFoundError, match=f"neither here nor in {tmp_path}/models"):
        find_template(ModelConfig(path="studio/Template-B"))


@pytest.mark.parametrize("dtype, levels", [(torch.float32, 1000), (torch.bfloat16, 376)])
def test_exact_upstream_rounds_timesteps_to_the_pipelines_dtype(dtype, levels, pipe, monkeypatch):
    seen = []

    def predict(timestep, latents, **_):
        seen.append(timestep)
        return latents

    monkeypatch.setattr(pipe, "torch_dtype", dtype)
    monkeypatch.setattr(pipe, "predict", predict)
    pipe.scheduler.set_timesteps(1000, training=True)
    FlowMatchSFT(exact_upstream=True)(pipe, EveryLevel(), input_latents=torch.zeros(1000, 1, 1, 1))
    assert len(torch.cat(seen).unique()) == levels


class EveryLevel:
    """Random numbers that reach each of 1000 noise levels once."""

    def uniform(self, _purpose: str) -> torch.Tensor:
        return (torch.arange(1000) + 0.5) / 1000

    def normal(self, _purpose: str, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(like)


@pytest.mark.parametrize("data", [lambda path: CachedDataset(path), lambda path: UnifiedDataset(path)])
def test_their_cache_is_refused_by_name_and_never_loaded(data, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "0.pth").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match="cache of DiffSynth-Studio.*never loaded.*python make_cache.py"):
        data(str(tmp_path))
