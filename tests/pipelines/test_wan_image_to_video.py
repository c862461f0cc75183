"""Wan's image-to-video and Fun-Control: latents as diffusers samples them, what the transformer reads, bad input."""

from functools import partial
from inspect import signature

import pytest
import test_family_contract as contract
import tiny
import torch
from families import SIZES, Family, clips
from miniatures import wan, wan_image
from miniatures.requests import GUIDED, LORA, image, sampled
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from diffsynth.core.data import Row, Sample, SampleAddress
from diffsynth.core.loader import ModelConfig
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.diffusion.randomness import SampleRNG
from diffsynth.pipelines.wan import WanPipeline
from diffsynth.pipelines.wan_fun_control import WanFunControlPipeline, model_fn_wan_fun_control
from diffsynth.pipelines.wan_image_to_video import WanImageToVideoPipeline, model_fn_wan_image_to_video

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


class Continued(Family):
    """A family whose trainings give the first frame, and the last one of a clip that ends with it."""

    extra_inputs = property(lambda self: ["input_image", *["end_image"] * ("flf2v" in self.name)])


def family(name: str, folder, kind=WanImageToVideoPipeline, tokens: int = 512, parts=wan_image.CLIP_PARTS) -> Continued:
    settings = SIZES | {"num_frames": 5, "max_sequence_length": tokens}
    return Continued(name, kind, folder, LAYERS, settings, parts=parts)


I2V = family("wan22_i2v", wan_image.image_to_video, tokens=24, parts=wan_image.PARTS)
CLIP = family("wan21_i2v_14b_480p", wan_image.image_to_video_with_clip)
FLF2V = family("wan21_flf2v_14b_720p", wan_image.first_and_last_frame)
CONTROL, MASKED_CONTROL = (
    family(f"fun_{channels}", partial(wan_image.fun_control, channels), WanFunControlPipeline) for channels in (48, 52)
)
VIDEO = [image(number, (48, 32)) for number in range(5)]
SIZE_OF_CLIPS = ["dataset.metadata=null", "dataset.height=32", "dataset.width=32", "dataset.num_frames=5"]
REQUEST = GUIDED | {"height": 32, "width": 48, "input_image": VIDEO[0]}
BOTH = REQUEST | {"end_image": VIDEO[4]}


def prepared(found: Family, request: dict) -> dict:
    """The inputs of the conditional prediction."""
    with torch.no_grad():
        shared, posi, _ = found.load().prepare([request])
    return shared | posi


# Sampling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    "found, request_",
    [(I2V, REQUEST), (I2V, BOTH), (CLIP, REQUEST), (FLF2V, BOTH)],
    ids=["first frame", "first and last frame", "CLIP", "CLIP of both"],
)
def test_latents_are_those_that_diffusers_samples(found, request_, guidance):
    requests = [request_ | {"cfg_scale": guidance, "prompt": prompt} for prompt in ("a red apple", "a line " * 9)]
    pipe = found.load()
    shared, posi, nega = pipe.prepare(requests)
    with torch.no_grad():
        ours = pipe.denoise(shared, posi, nega)
    assert (ours[0] - ours[1]).abs().max() > 1e-2
    theirs = wan_image.sampled_by_diffusers(found.folder(), list(map(pipe.complete, requests)), shared["noise"])
    assert_close(ours, theirs, atol=1e-4, rtol=0)
    for name in request_.keys() & {"input_image", "end_image"}:
        changed = [request | {name: VIDEO[2]} for request in requests]
        assert (sampled(pipe, *changed) - ours).abs().max() > 3e-4


@pytest.mark.parametrize("found, request_", [(CLIP, REQUEST), (FLF2V, BOTH)], ids=["first", "first and last"])
def test_each_request_of_a_batch_continues_its_own_frames(found, request_):
    pipe, requests = found.load(), [request_ | {"input_image": VIDEO[n], "seed": n} for n in (0, 1)]
    alone = torch.cat([sampled(pipe, request) for request in requests])
    assert_close(sampled(pipe, *requests), alone, atol=1e-5, rtol=1e-4)
    assert (alone[0] - alone[1]).abs().max() > 1e-2


def test_the_condition_is_a_mask_and_the_latents_of_a_grey_video_with_the_given_frames():
    pipe = I2V.load()
    for request in (REQUEST | {"num_frames": 9}, BOTH | {"num_frames": 9}):
        condition = prepared(I2V, request)["condition"]
        mask = torch.zeros(1, 4, 3, 4, 6)
        mask[:, :, 0] = 1
        frames = torch.zeros(1, 3, 9, 32, 48)
        frames[:, :, :1] = pipe.media.preprocess(VIDEO[0], pipe.device, torch.float32)
        if "end_image" in request:
            mask[:, 3, 2] = 1
            frames[:, :, 8:] = pipe.media.preprocess(VIDEO[4], pipe.device, torch.float32)
        assert torch.equal(condition[:, :4], mask)
        assert_close(condition[:, 4:], pipe.vae.encode(frames))


def test_features_are_those_of_each_image_before_the_last_layer_of_clip():
    pipe = CLIP.load()
    features = prepared(CLIP, BOTH)["image_emb"]
    assert features.shape == (1, 2, wan_image.CLIP_TOKENS, wan_image.CLIP_WIDTH)
    for number, frame in enumerate((VIDEO[0], VIDEO[4])):
        middle = frame.resize((42, 28), Image.Resampling.BICUBIC).crop((7, 0, 35, 28))
        pixels = torch.from_numpy(pipe.image_processor(middle, return_tensors="np")["pixel_values"])
        states = pipe.image_encoder(pixels, output_hidden_states=True).hidden_states
        assert len(states) == 4
        assert_close(features[:, number], states[2], atol=1e-5, rtol=1e-5)


def test_without_positions_for_two_images_only_the_first_has_features():
    inputs, dit = prepared(CLIP, BOTH), CLIP.load().dit
    names = signature(model_fn_wan_image_to_video).parameters
    given = {name: value for name, value in inputs.items() if name in names} | {"timestep": torch.tensor([500.0])}
    with torch.no_grad():
        both = model_fn_wan_image_to_video(dit, **given)
        first = model_fn_wan_image_to_video(dit, **given | {"image_emb": inputs["image_emb"][:, :1]})
        other = model_fn_wan_image_to_video(dit, **given | {"image_emb": inputs["image_emb"][:, 1:]})
    assert torch.equal(both, first) and (both - other).abs().max() > 1e-3


def test_what_the_transformer_reads_is_computed_without_it():
    pipe = CLIP.load()
    whole = pipe.prepare([BOTH])
    pipe.drop_models(["dit"])
    for ours, before in zip(pipe.prepare([BOTH]), whole, strict=True):
        for name, value in ours.items():
            assert not isinstance(value, Tensor) or torch.equal(value, before[name]), name


def test_released_names_of_clip_are_read(tmp_path):
    folder = CLIP.folder() / "image_encoder"
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    save_file({f"vision_model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    parts = {name: ModelConfig(path=str(CLIP.folder() / part)) for name, part in CLIP.parts.items()}
    parts["image_encoder"] = ModelConfig(path=str(tmp_path))
    pipe = WanImageToVideoPipeline.from_components(**parts, torch_dtype="float32")
    pipe.load_models(["image_encoder"])
    assert_close(dict(pipe.image_encoder.state_dict()), tensors)


# Training -------------------------------------------------------------------------------------------------------------


def test_a_loss_is_the_one_by_hand():
    pipe, rng = CLIP.load(), SampleRNG(0, [SampleAddress(0, 3)])
    inputs = prepared(CLIP, REQUEST)
    pipe.scheduler.set_timesteps(1000, training=True)
    clean = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    found = FlowMatchSFT()(pipe, rng=rng, **inputs | {"input_latents": clean})

    level, noise = int(1000 * rng.uniform("timestep")), rng.normal("noise", clean)
    sigma, weight = pipe.scheduler.sigmas[level], pipe.scheduler.training_weight(pipe.scheduler.timesteps)[level]
    seen = torch.cat([(1 - sigma) * clean + sigma * noise, inputs["condition"]], dim=1)
    predicted = pipe.dit(seen, 1000 * sigma[None], inputs["prompt_emb"], inputs["image_emb"][:, 0], return_dict=False)
    assert_close(found, (predicted[0] - (noise - clean)).pow(2).mean()[None] * weight)


def test_frames_are_the_videos_unless_the_row_has_others():
    module = FLF2V.module(lora=LORA).load()

    def loss(**columns):
        with torch.no_grad():
            return module([Sample(Row({"video": VIDEO, "prompt": "", **columns}), epoch=0, index=3)])

    assert torch.equal(loss(), loss(input_image=VIDEO[0], end_image=VIDEO[4]))
    assert (loss() - loss(end_image=VIDEO[0])).abs() > 1e-5


@pytest.mark.slow
def test_a_run_on_the_frames_of_clips_equals_one_on_their_cache(tmp_path):
    (clips() / "films.csv").write_text("video,prompt\n" + "".join(f"{number}.webp,red\n" for number in range(8)))
    data = ["dataset=video_folder", f"dataset.path={clips()}", *SIZE_OF_CLIPS, "dataset.metadata=films.csv"]
    evaluated = ["validation=trained", "validation.options.num_inference_steps=1"]
    plain = tiny.train(tmp_path / "plain", *FLF2V.overrides, *data, *evaluated)
    assert len(list((plain / "samples").glob("*step-*.png"))) == 2
    tiny.make_cache(tmp_path / "cache", *FLF2V.overrides, *data)
    cache = ["dataset=cache", f"dataset.path={tmp_path / 'cache'}", "dataset.height=null", "dataset.width=null"]
    cached = tiny.train(tmp_path / "cached", *FLF2V.overrides, *cache)
    before, after = ([line["loss"] for line in tiny.metrics(run) if "loss" in line] for run in (plain, cached))
    assert len(before) == 2 and before == pytest.approx(after, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("found", [I2V, CLIP, FLF2V], ids=str)
@pytest.mark.parametrize(
    "statement",
    [
        "a_batch_has_the_mean_loss_and_gradient_of_its_samples",
        "gradients_reach_all_that_is_trained_and_nothing_else",
        "checkpointing_changes_nothing",
        "weights_in_8_bits_change_the_loss_little",
    ],
)
def test_trainings_are_those_of_any_family(found, statement):
    test = getattr(contract, f"test_{statement}")
    test(found, *([(), LORA] if "trained" in signature(test).parameters else []))


# Fun-Control ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [CONTROL, MASKED_CONTROL], ids=str)
def test_a_control_video_comes_before_the_given_frames(found):
    pipe, times = found.load(), torch.tensor([500.0])
    names = signature(model_fn_wan_fun_control).parameters
    kept = 16 if found is CONTROL else 20
    for request in ({**REQUEST, "control_video": VIDEO}, {**REQUEST, "control_video": VIDEO, "input_image": None}):
        inputs = prepared(found, request)
        latents, text = inputs["latents"], inputs["prompt_emb"]
        condition, features = torch.zeros(1, 20, 2, 4, 6), torch.zeros(1, 257, wan_image.CLIP_WIDTH)
        if request["input_image"]:
            condition, features = inputs["condition"], inputs["image_emb"][:, 0]
        control = pipe.vae.encode(pipe.media.preprocess(VIDEO, pipe.device, torch.float32))
        with torch.no_grad():
            seen = torch.cat([latents, control, condition[:, -kept:]], dim=1)
            theirs = pipe.dit(seen, times, text, features, return_dict=False)[0]
            given = {name: value for name, value in inputs.items() if name in names}
            assert_close(model_fn_wan_fun_control(pipe.dit, timestep=times, **given), theirs, atol=1e-5, rtol=1e-5)


def test_a_training_reads_the_control_video_of_its_row():
    module = CONTROL.module(FlowMatchSFT(extra_inputs=["control_video"]), LORA).load()
    rows = [Row({"video": VIDEO, "prompt": "", "control_video": video}) for video in (VIDEO, VIDEO[::-1])]
    with torch.no_grad():
        first, second = (module([Sample(row, epoch=0, index=3)]) for row in rows)
    assert (first - second).abs() > 1e-5


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "found, request_, message",
    [
        (
            I2V,
            REQUEST | {"input_image": None},
            "continues a first frame, but input_image is not given; give it",
        ),
        (FLF2V, REQUEST, "trained with a first and a last frame, but end_image is not given"),
        (CLIP, REQUEST | {"max_sequence_length": 24}, "max_sequence_length is 24, expected 512"),
        (I2V, BOTH | {"num_frames": 1}, "num_frames is 1, but input_image and end_image are two frames"),
        (CONTROL, REQUEST, "WanFunControlPipeline needs control_video, which is not given"),
        (CONTROL, REQUEST | {"control_video": VIDEO[0]}, "control_video has 1 frames, expected at least num_frames=5"),
        (CONTROL, REQUEST | {"control_video": VIDEO[:3]}, "control_video has 3 frames, expected at least num_frames=5"),
        (CONTROL, REQUEST | {"reference_image": VIDEO[0]}, "has no argument 'reference_image'"),
        (CONTROL, REQUEST | {"camera_control_direction": "Left"}, "has no argument 'camera_control_direction'"),
    ],
)
def test_requests_that_cannot_be_sampled_are_refused(found, request_, message):
    with pytest.raises(ValueError, match=message):
        found.load().prepare([request_])


@pytest.mark.parametrize(
    "found, columns, message",
    [
        (
            I2V,
            [],
            r"cannot be trained without input_image; set task.extra_inputs=\[input_image\]",
        ),
        (FLF2V, ["input_image"], r"without end_image; set task.extra_inputs=\[input_image,end_image\]"),
        (CONTROL, ["input_image"], "WanFunControlPipeline cannot be trained without control_video"),
        (CONTROL, ["control_video", "reference_image"], "has no input 'reference_image'"),
    ],
)
def test_trainings_without_a_needed_column_are_refused(found, columns, message):
    with pytest.raises(ValueError, match=message):
        found.module(FlowMatchSFT(extra_inputs=columns), LORA).load()


def test_a_transformer_that_attends_to_clip_needs_it():
    pipe = family("", wan_image.image_to_video_with_clip, parts=wan_image.PARTS).load()
    with pytest.raises(ValueError, match="there are none; set model.image_encoder and model.image_processor"):
        sampled(pipe, REQUEST)
    clip = str(wan_image.image_to_video_with_clip() / "image_encoder")
    with pytest.raises(ValueError, match="dit reads no features of images; set model.image_encoder=null"):
        family("", wan_image.image_to_video, parts=wan_image.PARTS | {"image_encoder": clip}).build()


@pytest.mark.parametrize(
    "kind, folder, message",
    [
        (
            WanPipeline,
            wan_image.image_to_video,
            "reads 36 channels .* 16 and 16; take model=wan21_i2v_14b_480p",
        ),
        (WanImageToVideoPipeline, wan.text_to_video, "reads 16 channels .*36 and 16; take model=wan21_t2v_1_3b"),
        (WanImageToVideoPipeline, wan_image.fun_control, "reads 48 channels and predicts 16, expected 36 and 16"),
        (WanFunControlPipeline, wan_image.image_to_video, "reads 36 channels .*, expected 48 or 52 and 16"),
    ],
)
def test_transformers_of_neighbouring_models_are_refused_before_weights_are_read(kind, folder, message):
    with pytest.raises(ValueError, match=message):
        family("", folder, kind, parts=wan_image.PARTS).build()


def test_weights_of_a_reference_or_a_camera_are_refused_by_name(tmp_path):
    folder = wan_image.fun_control() / "transformer"
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    for name in ("ref_conv.weight", "control_adapter.conv.weight"):
        save_file(tensors | {name: torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
        with pytest.raises(ValueError, match=name):
            WanFunControlPipeline().build_models([ModelConfig(path=str(tmp_path))])
