import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hub_server import serve
from safetensors import safe_open

from diffsynth.core import hub
from diffsynth.core.loader import (
    ModelConfig,
    build_module,
    check_weights,
    load_model,
    load_state_dict,
    load_weights,
    model_config,
    read_metadata,
    save_safetensors,
    to_released_keys,
)
from diffsynth.pipelines.qwen_image import QwenImagePipeline

MODEL_ID = "owner/tiny"


def tiny_dit():
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 6, 6),
    )


def tiny_vae():
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4
    )


def tiny_text_encoder(tied):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"},
    }
    vision = {"hidden_size": 16, "intermediate_size": 24, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        text_config=text | {"tie_word_embeddings": tied}, vision_config=vision, tie_word_embeddings=tied
    )
    return Qwen2_5_VLForConditionalGeneration(config)


MODELS = {
    "dit": tiny_dit,
    "vae": tiny_vae,
    "text_encoder": lambda: tiny_text_encoder(tied=False),
    "tied_text_encoder": lambda: tiny_text_encoder(tied=True),
}


def inputs_of(model):
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    if hasattr(model, "tie_weights"):
        return {"input_ids": torch.arange(10)[None]}
    if hasattr(model, "decoder"):
        return {"sample": torch.randn(1, 3, 1, 16, 16, generator=generator).to(dtype)}
    return {
        "hidden_states": torch.randn(1, 16, 16, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(1, 5, 8, generator=generator).to(dtype),
        "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.bool),
        "timestep": torch.tensor([0.5]).to(dtype),
        "img_shapes": [[(1, 4, 4)]],
    }


@torch.no_grad()
def output_of(model):
    return next(iter(model(**inputs_of(model)).to_tuple()))


def save(model, folder, shard_size="1GB"):
    model.save_pretrained(folder, max_shard_size=shard_size)
    return sorted(folder.glob("*.safetensors"))


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("MODEL_BASE_PATH", "DOWNLOAD_SOURCE", "SKIP_DOWNLOAD"):
        monkeypatch.delenv(f"DIFFSYNTH_{name}", raising=False)


@pytest.fixture
def dit_files(tmp_path):
    return save(tiny_dit(), tmp_path / "dit")


@pytest.fixture
def dit_shards(tmp_path):
    return save(tiny_dit(), tmp_path / "shards", "30KB")


# Loading


@pytest.mark.parametrize("shard_size", ["1GB", "30KB"])
@pytest.mark.parametrize("name", MODELS)
def test_loaded_equals_saved_bit_for_bit(name, shard_size, tmp_path):
    saved = MODELS[name]().eval()
    files = save(saved, tmp_path, shard_size)
    assert (len(files) > 1) == (shard_size == "30KB")

    loaded = load_model(ModelConfig([str(file) for file in files]))

    assert loaded.state_dict().keys() == saved.state_dict().keys()
    for key, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    # Weights at other addresses may be summed up in another order.
    torch.testing.assert_close(output_of(loaded), output_of(saved), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_equal_those_of_from_pretrained(name, dtype, tmp_path):
    model = MODELS[name]()
    save(model, tmp_path)
    reference = type(model).from_pretrained(tmp_path, torch_dtype=dtype).eval()

    loaded = load_model(ModelConfig(str(tmp_path)), dtype)

    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {
        k: v.dtype for k, v in reference.state_dict().items()
    }
    assert torch.equal(output_of(loaded), output_of(reference))


def test_loaded_module_is_frozen_in_eval_mode_and_real(dit_files):
    loaded = load_model(ModelConfig(dit_files))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers(), loaded.pos_embed.pos_freqs])


def test_tied_weights_share_memory(tmp_path):
    files = save(tiny_text_encoder(tied=True), tmp_path)
    assert "lm_head.weight" not in load_state_dict(files)
    loaded = load_model(ModelConfig(files))
    assert loaded.lm_head.weight.data_ptr() == loaded.model.language_model.embed_tokens.weight.data_ptr()


def test_either_name_of_tied_weights_is_enough(tmp_path):
    model = tiny_text_encoder(tied=True).eval()
    files = save(model, tmp_path)

    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop(next(key for key in tensors if "embed_tokens" in key))

    change(files[0], rename)
    assert torch.equal(output_of(load_model(ModelConfig(files))), output_of(model))


def test_what_the_library_keeps_in_fp32_stays_fp32(dit_files, monkeypatch):
    from diffusers import QwenImageTransformer2DModel

    monkeypatch.setattr(QwenImageTransformer2DModel, "_keep_in_fp32_modules", ["txt_norm"])
    loaded = load_model(ModelConfig(dit_files), torch.bfloat16)
    assert loaded.txt_norm.weight.dtype == torch.float32
    assert loaded.img_in.weight.dtype == torch.bfloat16


def test_integers_are_not_cast(tmp_path):
    save_safetensors({"index": torch.arange(3), "weight": torch.ones(3)}, tmp_path / "a.safetensors")
    tensors = load_state_dict(tmp_path / "a.safetensors", torch.bfloat16)
    assert (tensors["index"].dtype, tensors["weight"].dtype) == (torch.int64, torch.bfloat16)


def test_config_may_lie_elsewhere(dit_files, tmp_path):
    config = dit_files[0].parent.joinpath("config.json").rename(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match="config="):
        load_model(ModelConfig(dit_files))
    for place in (config, config.parent):
        load_model(ModelConfig(dit_files, config=place))


# Names


@pytest.mark.parametrize("tied", [True, False])
def test_released_names_load_and_come_back(tied, tmp_path):
    model = tiny_text_encoder(tied)
    released = to_released_keys(model, model.state_dict())
    assert {key.split(".")[0] for key in released} == {"model", "visual", "lm_head"}
    assert not any(key.startswith(("model.visual", "model.language_model")) for key in released)

    if tied:
        del released["lm_head.weight"]
    save_safetensors(released, tmp_path / "model.safetensors")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(str(tmp_path)))

    assert torch.equal(output_of(loaded), output_of(model.eval()))
    again = to_released_keys(loaded, loaded.state_dict())
    assert all(torch.equal(again[key], tensor) for key, tensor in released.items())


def test_dropped_prefix_comes_back(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(CLIPTextConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_attention_heads=2))
    save(model, tmp_path)
    released = {f"text_model.{key}": tensor for key, tensor in model.state_dict().items()}
    save_safetensors(released, tmp_path / "model.safetensors")
    loaded = load_model(ModelConfig(str(tmp_path)))
    assert to_released_keys(loaded, loaded.state_dict()).keys() == released.keys()


def test_module_names_load_too(tmp_path):
    model = tiny_text_encoder(tied=False)
    save(model, tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    save_safetensors(model.state_dict(), tmp_path / "model.safetensors")
    assert torch.equal(output_of(load_model(ModelConfig(str(tmp_path)))), output_of(model.eval()))


def test_diffusers_names_are_the_released_ones():
    model = tiny_dit()
    assert to_released_keys(model, model.state_dict()).keys() == model.state_dict().keys()


# Bad files


@pytest.mark.parametrize("indexed", [True, False])
def test_missing_shard_is_named(indexed, dit_shards):
    dit_shards[1].unlink()
    if not indexed:
        next(dit_shards[0].parent.glob("*.index.json")).unlink()
    with pytest.raises(ValueError, match=dit_shards[1].name):
        load_model(ModelConfig(str(dit_shards[0].parent)))


def test_missing_shard_is_named_by_the_index_alone(dit_shards):
    index = next(dit_shards[0].parent.glob("*.index.json"))
    renamed = {file.name: f"part{number}.safetensors" for number, file in enumerate(dit_shards)}
    weight_map = {key: renamed[file] for key, file in json.loads(index.read_text())["weight_map"].items()}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    files = [file.rename(file.with_name(renamed[file.name])) for file in dit_shards]
    load_model(ModelConfig(files))
    with pytest.raises(ValueError, match="part1.safetensors"):
        load_model(ModelConfig([files[0], *files[2:]]))


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_file_is_named(size, dit_files):
    file = dit_files[0]
    os.truncate(file, size % file.stat().st_size)
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}.* bytes"):
        load_model(ModelConfig(file))


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"\x04" + bytes(7) + b"oops"])
def test_foreign_file_is_named(content, dit_files):
    dit_files[0].write_bytes(content)
    with pytest.raises(ValueError, match="no safetensors"):
        load_model(ModelConfig(dit_files))


def test_weights_of_another_architecture(dit_files, tmp_path):
    vae = save(tiny_vae(), tmp_path / "vae")
    module = build_module(dit_files)
    with pytest.raises(ValueError, match="another architecture") as error:
        check_weights(module, vae)
    assert "QwenImageTransformer2DModel" in str(error.value)
    assert "time_text_embed.timestep_embedder.linear_1.weight is missing" in str(error.value)


def change(file, edit):
    tensors = load_state_dict(file)
    edit(tensors)
    save_safetensors(tensors, file)


def test_every_misfit_is_named_with_its_file_and_shapes(dit_files):
    def spoil(tensors):
        tensors["img_in.wieght"] = tensors.pop("img_in.weight")
        tensors["proj_out.bias"] = torch.zeros(7)

    change(dit_files[0], spoil)
    with pytest.raises(ValueError) as error:
        load_model(ModelConfig(dit_files))
    text = str(error.value)
    assert "img_in.weight is missing" in text
    assert f"img_in.wieght in {dit_files[0]} is unexpected (nearest: img_in.weight)" in text
    assert f"proj_out.bias in {dit_files[0]} has shape [7], expected [16]" in text


def test_unchecked_loading_leaves_nothing_on_meta(dit_files):
    change(dit_files[0], lambda tensors: tensors.pop("img_in.weight"))
    with pytest.raises(ValueError, match="img_in.weight"):
        load_weights(build_module(dit_files), dit_files)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt"])
def test_pickles_are_refused(suffix, tmp_path):
    file = tmp_path / f"model.{suffix}"
    torch.save({}, file)
    for refused in (
        lambda: ModelConfig(str(file)),
        lambda: ModelConfig(model_id=MODEL_ID, origin_file_pattern=f"*.{suffix}"),
        lambda: load_state_dict(file),
    ):
        with pytest.raises(ValueError, match="never loaded.*save_file"):
            refused()


@pytest.mark.parametrize("name", ["QwenImageTransformer2DModle", "DiffusionPipeline", "QwenImagePipeline"])
def test_config_of_no_network(name, dit_files):
    config = dit_files[0].parent / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": name}))
    with pytest.raises(ValueError, match=f"{name}.*Nearest"):
        build_module(dit_files)


def test_a_controlnet_that_is_not_there_is_to_be_made(tmp_path):
    made_by = QwenImagePipeline.networks()["controlnet"].made_by
    with pytest.raises(
        FileNotFoundError,
        match=r"^model.controlnet.path: .*/gone does not exist; make one: python controlnet.py .*/gone",
    ):
        ModelConfig(path=str(tmp_path / "gone")).check_path("controlnet", made_by)


def test_config_without_a_class(dit_files):
    (dit_files[0].parent / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="_class_name"):
        build_module(dit_files)


# Saving


def test_shared_overlapping_and_strided_tensors_are_saved(tmp_path):
    base = torch.arange(12.0)
    tensors = {"whole": base, "same": base, "left": base[:8], "right": base[4:], "strided": base.view(3, 4).T}
    save_safetensors(tensors, tmp_path / "a.safetensors", {"note": "overlap"})
    loaded = load_state_dict(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"note": "overlap"}


def test_a_failed_save_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.safetensors"
    save_safetensors({"weight": torch.ones(2)}, file)
    with pytest.raises(Exception):  # noqa: B017 - whichever the library raises
        save_safetensors({"weight": torch.ones(2, device="meta")}, file)
    assert torch.equal(load_state_dict(file)["weight"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [file]


def test_a_loaded_file_can_be_replaced(dit_files):
    loaded = load_model(ModelConfig(dit_files))
    before = loaded.img_in.weight.clone()
    change(dit_files[0], lambda tensors: tensors.update({"img_in.weight": before + 1}))
    assert torch.equal(loaded.img_in.weight, before)


# Where files are


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "remote"
    save(tiny_dit(), folder / "transformer", "30KB")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    return folder


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(source):
        raise AssertionError(f"{source} was asked")

    monkeypatch.setattr(model_config, "_hub", refuse)


def test_local_files_win(repository, monkeypatch, no_hub):
    repository.parent.joinpath("owner").mkdir()
    repository.rename(repository.parent / MODEL_ID)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(repository.parent))

    weights = ModelConfig(model_id=MODEL_ID, origin_file_pattern="transformer/*.safetensors")
    files = weights.resolve()
    assert files == sorted(files) and len(files) > 1
    load_model(weights)
    folder = repository.parent / MODEL_ID
    assert ModelConfig(model_id=MODEL_ID, origin_file_pattern="tokenizer/").resolve() == [folder / "tokenizer"]
    assert ModelConfig(model_id=MODEL_ID).resolve() == [folder]
    both = ModelConfig(model_id=MODEL_ID, origin_file_pattern=["tokenizer/", "transformer/*.safetensors"])
    assert both.resolve() == [folder / "tokenizer", *files]


def test_arguments_win_over_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", "elsewhere")
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "huggingface")
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "True")
    by_variables = ModelConfig(model_id=MODEL_ID)
    assert (by_variables.source, by_variables.skips_download) == ("huggingface", True)
    assert by_variables.folder.parts[-3:] == ("elsewhere", "owner", "tiny")
    by_arguments = ModelConfig(
        model_id=MODEL_ID, download_source="modelscope", local_model_path=str(tmp_path), skip_download=False
    )
    assert (by_arguments.source, by_arguments.skips_download) == ("modelscope", False)
    assert by_arguments.folder == tmp_path / MODEL_ID


def test_a_folder_is_its_weights_or_itself(dit_shards, tmp_path):
    assert ModelConfig(str(dit_shards[0].parent)).resolve() == dit_shards
    (tmp_path / "tokenizer").mkdir()
    assert ModelConfig(str(tmp_path / "tokenizer")).resolve() == [tmp_path / "tokenizer"]
    with pytest.raises(FileNotFoundError, match="absent.safetensors"):
        ModelConfig(str(tmp_path / "absent.safetensors")).resolve()


def test_path_or_model_id_is_needed():
    with pytest.raises(ValueError, match="a path or a model_id"):
        ModelConfig()


def test_a_path_wins_over_a_model_id(tmp_path):
    (tmp_path / "a.safetensors").touch()
    assert ModelConfig(str(tmp_path), MODEL_ID).resolve() == [tmp_path / "a.safetensors"]


def test_unknown_source(monkeypatch):
    with pytest.raises(ValueError, match="'hugging'.*modelscope or huggingface"):
        ModelConfig(model_id=MODEL_ID, download_source="hugging")


# Hubs

ENDPOINT = {"modelscope": "MODELSCOPE_ENDPOINT", "huggingface": "HF_ENDPOINT"}
# Whole, twice at the same time, then again without one of its files, then a pattern of which the hub has nothing.
RESOLVE = """
import sys
from concurrent.futures import ThreadPoolExecutor
import huggingface_hub, modelscope
from diffsynth.core.loader import ModelConfig
huggingface_hub.snapshot_download, modelscope.snapshot_download  # two threads at once cannot import them
def resolve(pattern):
    return ModelConfig(model_id=sys.argv[1], origin_file_pattern=pattern).resolve()
files = []
for pattern in ("transformer/diffusion*.safetensors", "tokenizer/"):
    with ThreadPoolExecutor(2) as two:
        first, second = two.map(resolve, [pattern] * 2)
    assert first == second
    files += first
print(*files, sep="\\n")
files[1].unlink()
ModelConfig(model_id=sys.argv[1], origin_file_pattern="transformer/*.safetensors").resolve()
ModelConfig(model_id=sys.argv[1], origin_file_pattern="vae/*.safetensors").resolve()
"""


@pytest.mark.parametrize("source", ENDPOINT)
def test_what_is_absent_is_downloaded_and_what_the_hub_lacks_is_named(source, repository, tmp_path):
    """In a process of its own: the clients read their endpoint when they are imported."""
    with serve(repository, MODEL_ID) as (endpoint, fetched):
        settings = {
            ENDPOINT[source]: endpoint,
            "DIFFSYNTH_DOWNLOAD_SOURCE": source,
            "DIFFSYNTH_MODEL_BASE_PATH": str(tmp_path),
            "HF_HOME": str(tmp_path / "home"),
            "MODELSCOPE_CACHE": str(tmp_path / "home"),
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-c", RESOLVE, MODEL_ID]
        result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert "owner/tiny: vae/*.safetensors not found" in result.stderr
    folder, names = tmp_path / MODEL_ID, [file.name for file in sorted(repository.glob("transformer/*.safetensors"))]
    lines = result.stdout.splitlines()[-len(names) - 1 :]
    assert lines == [str(folder / "transformer" / name) for name in names] + [f"{folder / 'tokenizer'}"]
    load_model(ModelConfig(str(folder / "transformer")))
    whole = {file.relative_to(repository).as_posix() for file in repository.rglob("*") if file.is_file()}
    assert Counter(fetched) == {**dict.fromkeys(whole, 1), f"transformer/{names[1]}": 2}


@pytest.fixture(params=["refuses", "is silent", "has no name"])
def dead_endpoint(request):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if request.param == "refuses":
            listener.close()
        yield f"http://hub.invalid:{port}" if request.param == "has no name" else f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("source", ENDPOINT)
def test_no_network_is_waited_for_once_and_answered_with_what_to_do(source, dead_endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.2)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", dead_endpoint)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", dead_endpoint)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    config = ModelConfig(model_id=MODEL_ID, origin_file_pattern="vae/*.safetensors", download_source=source)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)  # neither client is asked, which would retry
    monkeypatch.setattr("modelscope.snapshot_download", None)
    with pytest.raises(FileNotFoundError) as error:
        config.resolve()
    assert f"vae/*.safetensors not found in {tmp_path / MODEL_ID} ({dead_endpoint} does not answer)" in str(error.value)
    for name in ("MODEL_BASE_PATH", "DOWNLOAD_SOURCE", "SKIP_DOWNLOAD"):
        assert f"DIFFSYNTH_{name}" in str(error.value)


def test_skipped_download_fails_without_asking(tmp_path, no_hub):
    config = ModelConfig(
        model_id=MODEL_ID, origin_file_pattern="tokenizer/", local_model_path=str(tmp_path), skip_download=True
    )
    with pytest.raises(FileNotFoundError, match="switched off"):
        config.resolve()


@pytest.mark.parametrize("pattern", ["tokenizer/", "tokenizer/*.json"])
def test_two_that_find_files_absent_download_them_once_and_both_get_all(pattern, tmp_path, monkeypatch):
    both_found_them_absent, downloads = threading.Barrier(2), []

    def slow(model_id, local_dir, **_):
        downloads.append(model_id)
        (local_dir / "tokenizer").mkdir(parents=True, exist_ok=True)
        for name in ("merges.json", "vocab.json"):
            time.sleep(0.05)
            (local_dir / "tokenizer" / name).write_text("{}")

    def resolve(config):
        return [file.name for found in config.resolve() for file in (found.iterdir() if found.is_dir() else [found])]

    monkeypatch.setattr(model_config, "answers", lambda endpoint: both_found_them_absent.wait(60) < 2)
    monkeypatch.setattr(model_config, "_hub", lambda source: ("hub", slow))
    config = ModelConfig(model_id=MODEL_ID, origin_file_pattern=pattern, local_model_path=str(tmp_path))
    with ThreadPoolExecutor(2) as two:
        for names in two.map(resolve, [config] * 2):
            assert sorted(names) == ["merges.json", "vocab.json"]
    assert downloads == [MODEL_ID]
    assert [file.name for file in (tmp_path / MODEL_ID).iterdir()] == ["tokenizer"]  # the lock is not in there


def test_an_interrupted_folder_is_not_taken_for_whole(tmp_path, monkeypatch):
    def interrupted(model_id, local_dir, **_):
        (local_dir / "tokenizer" / "vocab.json").write_text("{}")
        raise ConnectionError("cut")

    def whole(model_id, local_dir, **_):
        (local_dir / "tokenizer" / "merges.txt").write_text("")

    monkeypatch.setattr(model_config, "answers", lambda endpoint: True)
    config = ModelConfig(model_id=MODEL_ID, origin_file_pattern="tokenizer/", local_model_path=str(tmp_path))
    monkeypatch.setattr(model_config, "_hub", lambda source: ("hub", interrupted))
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="cut"):
            config.resolve()
    monkeypatch.setattr(model_config, "_hub", lambda source: ("hub", whole))
    files = sorted(file.name for file in config.resolve()[0].iterdir())
    assert files == ["merges.txt", "vocab.json"]


def test_metadata_of_another_file_are_an_error_of_one_line(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors is no safetensors file") as error:
        read_metadata(tmp_path / "a.safetensors", "diffsynth")
    assert "\n" not in str(error.value)
