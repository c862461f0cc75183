"""Wan's weights in the layout of its authors: read as the library's, by name, and written as they were read."""

import json

import pytest
import tiny
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from families import FAMILIES
from miniatures import wan, wan_image, wan_original
from miniatures.requests import REQUEST, sampled
from safetensors.torch import load_file
from torch import nn

from diffsynth.config import build
from diffsynth.core.loader import ModelConfig
from diffsynth.diffusion import architectures
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.pipelines.layouts.wan import TRANSFORMER_LAYOUT, of_transformer
from diffsynth.pipelines.wan import WanPipeline
from diffsynth.pipelines.wan_image_to_video import WanImageToVideoPipeline
from diffsynth.plan.meta_pipeline import meta_pipeline

FAMILY = next(family for family in FAMILIES if family.name == "wan21_t2v_1_3b")
ORIGINAL, CONVERTED = "Wan-AI/Wan2.1-T2V-1.3B", "DiffSynth-Studio/Wan-Series-Converted-Safetensors"


def vae(**sizes) -> AutoencoderKLWan:
    return AutoencoderKLWan(base_dim=4, num_res_blocks=2, **sizes)


def vae_22() -> AutoencoderKLWan:
    form = {"is_residual": True, "patch_size": 2, "scale_factor_spatial": 16, "in_channels": 12, "out_channels": 12}
    return vae(**form, z_dim=48, decoder_base_dim=8, latents_mean=[0.0] * 48, latents_std=[1.0] * 48)


NETWORKS = {
    "text to video": (wan.transformer, wan_original.transformer),
    "image to video": (wan_image.with_clip, wan_original.transformer),
    "first and last frame": (lambda: wan_image.with_clip(pos_embed_seq_len=10), wan_original.transformer),
    "vae 2.1": (vae, wan_original.vae_21),
    "vae 2.2": (vae_22, wan_original.vae_22),
    "umt5": (wan.text_encoder, wan_original.umt5),
    "clip": (wan_image.clip_vision, wan_original.clip),
}


def original(name, folder):
    """A network with random weights, its file with the original's names, and the folder of its config.json."""
    make, turned = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval()
    for parameter in network.parameters():
        parameter.data = torch.randn_like(parameter)
    network.save_pretrained(folder / "released")
    state = turned(network.state_dict())
    return network, wan_original.written(state, folder / "own" / "model.safetensors"), folder / "released"


class AnyWan(WanImageToVideoPipeline):
    """All networks of Wan's models, whichever they are."""

    def check_networks(self) -> None:
        """Networks of any sizes."""


def read(file, config) -> nn.Module:
    """The one network in a file."""
    pipe = AnyWan(torch_dtype=torch.float32)
    pipe.build_models([ModelConfig(path=str(file), config=str(config))])
    pipe.load_models()
    (name,) = pipe.built_models
    return getattr(pipe, name)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_under_the_originals_names_are_those_of_the_library(name, tmp_path):
    network, file, config = original(name, tmp_path)
    expected, found = network.state_dict(), read(file, config).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_the_text_encoders_two_embeddings_are_one(tmp_path):
    network, file, config = original("umt5", tmp_path)
    module = read(file, config)
    assert module.encoder.embed_tokens.weight is module.shared.weight
    assert "encoder.embed_tokens.weight" not in load_file(file) and module.shared.weight.abs().sum() > 0


def test_names_of_vace_and_of_comfyuis_files_are_the_librarys():
    sizes = {"num_attention_heads": 1, "attention_head_dim": 12, "ffn_dim": 8, "num_layers": 2, "text_dim": 8}
    with torch.device("meta"):
        names = WanVACETransformer3DModel(**sizes, vace_layers=[0, 1]).state_dict().keys()
    for start in ("", "model.diffusion_model."):
        keys = {f"{start}{key}": name for name, key in zip(names, turned(names), strict=True)}
        assert TRANSFORMER_LAYOUT.holds(keys) and not TRANSFORMER_LAYOUT.holds(names)
        assert {key: each[0] for key, each in of_transformer(keys).items()} == keys


def turned(names) -> list[str]:
    return list(wan_original.renamed(dict.fromkeys(names), wan_original.TRANSFORMER))


@pytest.mark.parametrize(
    ("name", "key", "shape", "message"),
    [
        ("text to video", "blocks.0.self_attn.q.weight", None, "blocks.0.attn1.to_q.weight is missing"),
        ("text to video", "blocks.0.ffn.0.bias", (3,), "blocks.0.ffn.0.bias in .* has shape .3., expected .96."),
        ("clip", "visual.transformer.0.attn.to_qkv.weight", (71, 24), "to_qkv.weight in .* has shape .71, 24."),
        (
            "clip",
            "visual.pos_embedding",
            (2, 5, 24),
            "visual.pos_embedding in .* has shape .2, 5, 24., expected .5, 24.",
        ),
        ("umt5", "blocks.0.odd", (2,), "blocks.0.odd in .* is unexpected"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_as_the_file_writes_it(name, key, shape, message, tmp_path):
    _, file, config = original(name, tmp_path)
    state = load_file(file)
    state.pop(key, None)
    wan_original.written(state | ({} if shape is None else {key: torch.zeros(shape)}), file)
    with pytest.raises(ValueError, match=message):
        read(file, config)


# Configurations ------------------------------------------------------------------------------------------------------


def released(folder) -> dict[str, dict]:
    """What the package would have of a miniature's repository, in which the autoencoder has the released blocks."""
    parts = ("transformer", "text_encoder", "vae")
    return {part: json.loads((folder / part / "config.json").read_text()) for part in parts}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """The same weights in diffusers' layout and in that of Wan's authors, in a folder of downloaded models."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    parts = {"transformer": wan.transformer(), "vae": vae()}
    folder = wan.write(root / f"{ORIGINAL}-Diffusers", wan.WanPipeline, **parts)
    wan_original.repository(folder, root / ORIGINAL)
    wan_original.repository(folder, root / CONVERTED)
    (root / CONVERTED / "config.json").unlink()
    return root


@pytest.fixture
def models(repositories, monkeypatch):
    """Only these models are on the machine, and known to the package."""
    known = {f"{ORIGINAL}-Diffusers": released(repositories / f"{ORIGINAL}-Diffusers")}
    monkeypatch.setattr(architectures, "architectures", lambda: known)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(repositories))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    return repositories


FILES = {"dit": "diffusion_pytorch_model*", "text_encoder": "models_t5_umt5-xxl-enc-bf16", "vae": "Wan2.1_VAE"}


def typed(**repositories: str) -> list[str]:
    """What is typed to read components from repositories of Wan's authors."""
    words = [f"model.{name}.model_id={model_id}" for name, model_id in repositories.items()]
    return words + [f'model.{name}.origin_file_pattern="{FILES[name]}.safetensors"' for name in repositories]


def pipeline(*overrides: str) -> WanPipeline:
    sizes = [f"model.{name}={value}" for name, value in FAMILY.settings.items()]
    cfg = tiny.compose("generate", "model=wan21_t2v_1_3b", "model.torch_dtype=float32", *sizes, *overrides)
    pipe = build(cfg)["model"]()
    pipe.progress_bar = iter
    return pipe


@pytest.mark.parametrize("others", [ORIGINAL, CONVERTED])
def test_a_models_yaml_reads_the_files_of_its_authors(others, models):
    found = pipeline(*typed(dit=ORIGINAL, text_encoder=others, vae=others))
    expected = pipeline()
    for pipe in (found, expected):
        pipe.load_models()
    assert torch.equal(sampled(found, REQUEST), sampled(expected, REQUEST))
    assert found.weight_files("dit")[0].parent == models / ORIGINAL
    assert found.fingerprint("dit") != expected.fingerprint("dit")
    assert "config.json" not in found.input_files()["dit"] and "config.json" in expected.input_files()["dit"]


@pytest.mark.parametrize("are_here", [True, False])
def test_a_plan_needs_no_weights_of_its_authors_files(are_here, models, monkeypatch, tmp_path):
    if not are_here:
        monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    words = typed(dit=ORIGINAL, text_encoder=CONVERTED, vae=CONVERTED)
    pipe = meta_pipeline(build(tiny.compose("generate", "model=wan21_t2v_1_3b", *words))["model"], tokens=8)
    assert pipe.dit.config.num_layers == 2 and pipe.vae.config.base_dim == 4


def test_scripts_read_them_in_any_order_and_without_names(models):
    files = [(CONVERTED, "Wan2.1_VAE.safetensors"), (ORIGINAL, "diffusion_pytorch_model*.safetensors")]
    pipe = WanPipeline.from_pretrained(torch.float32, model_configs=[ModelConfig(None, *each) for each in files])
    assert pipe.built_models == {"dit", "vae"}


def test_a_file_of_an_unknown_model_asks_for_a_repository(models):
    file = models / ORIGINAL / "Wan2.1_VAE.safetensors"
    with pytest.raises(ValueError, match=f"Wan2.1_VAE.safetensors has its authors.*set config= .*{ORIGINAL}-Diffusers"):
        WanPipeline.from_pretrained(torch.float32, model_configs=[ModelConfig(str(file))])
    given = ModelConfig(str(file), config=f"{ORIGINAL}-Diffusers")
    assert WanPipeline.from_pretrained(torch.float32, model_configs=[given]).vae is not None


def test_pickles_are_refused_with_what_converts_them():
    with pytest.raises(
        ValueError, match="Wan2.1_VAE.pth is a pickle.* convert it: .*torch.load.'Wan2.1_VAE.pth', weig"
    ):
        ModelConfig(model_id=ORIGINAL, origin_file_pattern="Wan2.1_VAE.pth")


# Exports -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_original", [False, True])
def test_weights_trained_in_full_have_the_names_that_were_read(is_original, models):
    words = typed(dit=ORIGINAL, text_encoder=ORIGINAL) if is_original else []
    pipe = pipeline(*words)
    module = PipelineTrainingModule(pipe, FAMILY.task("dit", "text_encoder"), None, seed=0).load()
    for name in ("dit", "text_encoder"):
        (file,) = pipe.weight_files(name)
        exported = module.export_weights()[name][0]
        assert exported.keys() == load_file(file).keys()
        assert all(torch.equal(exported[key], tensor) for key, tensor in load_file(file).items())
    WanTransformer3DModel.from_config(pipe.dit.config).load_state_dict(
        {
            of_transformer([key])[key][0] if is_original else key: t
            for key, t in module.export_weights()["dit"][0].items()
        }
    )


def test_a_network_whose_files_have_divided_tensors_is_written_under_the_librarys_names(tmp_path):
    network, file, config = original("clip", tmp_path)
    pipe = AnyWan(torch_dtype=torch.float32)
    pipe.build_models([ModelConfig(path=str(file), config=str(config))])
    pipe.load_models()
    written = pipe.released_weights("image_encoder", network.state_dict())
    assert "vision_model.encoder.layers.0.self_attn.q_proj.weight" in written
    again = read(wan_original.written(written, tmp_path / "again.safetensors"), config)
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in network.state_dict().items())
