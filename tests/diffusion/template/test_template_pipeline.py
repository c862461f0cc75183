"""Sampling with templates: several at once, on either side of guidance, one in memory at a time."""

import gc
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import templates
import tiny
import torch
from PIL import Image

from diffsynth.core.loader import ModelConfig
from diffsynth.diffusion.pipeline.units import run_units
from diffsynth.diffusion.template import TemplatePipeline
from diffsynth.diffusion.template import model as template_model

SIZE = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 0, "progress_bar_cmd": iter}
PROMPT = "a red apple"

# Gives whatever it is asked for.
GIVES = """
import torch


class Gives(torch.nn.Module):
    def process_inputs(self, give, **kwargs):
        assert "model_id" not in kwargs and "pipe" in kwargs
        return {"give": give}

    def forward(self, give, **kwargs):
        assert not torch.is_grad_enabled()
        return give


TEMPLATE_MODEL = Gives
"""


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """A template that makes keys and values of a number, one that makes them of two blocks only, one that gives."""
    texts = {"scale": templates.SCALE, "part": templates.FROZEN_PART, "gives": GIVES}
    return [templates.write(tmp_path / name, text) for name, text in texts.items()]


@pytest.fixture
def load(folders):
    def pipeline(*numbers: int, **options) -> TemplatePipeline:
        configs = [ModelConfig(path=str(folders[number])) for number in numbers]
        return TemplatePipeline.from_pretrained(torch_dtype=torch.float32, model_configs=configs, **options)

    return pipeline


def pixels(image: Image.Image) -> np.ndarray:
    return np.array(image, dtype=int)


def some_lora(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"A": (2, 128), "B": (128, 2)}
    layers = [f"transformer.transformer_blocks.{block}.attn.to_v" for block in range(4)]
    return {
        f"{n}.lora_{s}.weight": torch.randn(shape, generator=generator) / 4
        for n in layers
        for s, shape in shapes.items()
    }


def some_text(seed: int, length: int = 2) -> torch.Tensor:
    return torch.randn(1, length, 128, generator=torch.Generator().manual_seed(seed))


# One template ---------------------------------------------------------------------------------------------------------


def test_a_template_samples_another_picture_and_its_input_decides_which(load, pipe):
    template = load(0)
    plain, *sampled = (
        template(pipe, prompt=PROMPT, **SIZE)
        if scale is None
        else template(pipe, prompt=PROMPT, template_inputs=[{"scale": scale}], **SIZE)
        for scale in (None, 0.1, 0.9)
    )
    assert np.array_equal(pixels(plain), pixels(pipe(PROMPT, **SIZE)))
    assert not any(np.array_equal(pixels(plain), pixels(image)) for image in sampled)
    assert not np.array_equal(pixels(sampled[0]), pixels(sampled[1]))


def test_what_a_template_makes_is_what_the_pipeline_takes(load, pipe):
    template = load(0)
    sampled = template(
        pipe, prompt=PROMPT, template_inputs=[{"scale": 0.9}], negative_template_inputs=[{"scale": 0.2}], **SIZE
    )
    made = template.arguments(pipe, [{"scale": 0.9}], [{"scale": 0.2}])
    assert made.keys() == {"kv_cache", "negative_kv_cache"}
    assert np.array_equal(pixels(sampled), pixels(pipe(PROMPT, **made, **SIZE)))


@pytest.mark.parametrize("name, make", [("lora", some_lora), ("extra_text_embedding", some_text), ("kv_cache", None)])
def test_each_prediction_reads_its_own_side(name, make, pipe, load):
    """v_nega + s (v_posi - v_nega), each from a pipeline that has one side only."""
    make = make or (lambda seed: load(0).arguments(pipe, [{"scale": seed / 2}])["kv_cache"])
    given = {"latents": torch.randn(1, 16, 4, 4), "cfg_rescale": False}
    given_size = {name: value for name, value in SIZE.items() if name != "progress_bar_cmd"}
    request = pipe.complete({"prompt": PROMPT, name: make(1), f"negative_{name}": make(2), **given_size})

    def predict(**changes):
        pipe.set_timesteps(request)
        with torch.no_grad():
            shared, posi, nega = run_units(pipe.units, pipe, *pipe.split_request({**request, **changes}))
            sides = {**shared, **given}, posi, nega
            return pipe.guided_velocity(torch.tensor([500.0]), changes.get("cfg_scale", 4.0), *sides)

    positive = predict(cfg_scale=1)
    negative = predict(cfg_scale=1, prompt="", **{name: make(2), f"negative_{name}": None})
    assert torch.allclose(predict(), negative + 4 * (positive - negative), atol=1e-4)
    assert not torch.allclose(predict(**{f"negative_{name}": None}), predict(), atol=1e-3)


def test_a_lora_input_samples_what_the_file_samples(load, pipe, load_pipe, tiny, tmp_path):
    from safetensors.torch import save_file

    save_file(some_lora(0), tmp_path / "a.safetensors")
    loaded = load_pipe(tiny)
    loaded.load_lora(loaded.dit, tmp_path / "a.safetensors")
    given = pixels(pipe(PROMPT, lora=some_lora(0), cfg_scale=1, **SIZE))
    assert np.abs(given - pixels(loaded(PROMPT, cfg_scale=1, **SIZE))).max() <= 1
    assert np.abs(given - pixels(pipe(PROMPT, cfg_scale=1, **SIZE))).max() > 1


def test_requests_of_a_batch_may_have_their_own(load, pipe):
    options = {name: value for name, value in SIZE.items() if name != "progress_bar_cmd"}
    requests = [
        {"prompt": prompt, "kv_cache": load(0).arguments(pipe, [{"scale": scale}])["kv_cache"], **options}
        for prompt, scale in ((PROMPT, 0.1), ("a rocket that is much longer", 0.9))
    ]
    for image, request in zip(pipe.generate(requests), requests, strict=True):
        assert np.abs(pixels(image) - pixels(pipe.generate([request])[0])).max() <= 1


# Several --------------------------------------------------------------------------------------------------------------


def test_several_templates_read_side_by_side(load, pipe):
    both = load(0, 1)
    inputs = [{"model_id": 0, "scale": 0.3}, {"model_id": 1, "scale": 0.7}, {"scale": 0.5}]
    made = both.arguments(pipe, inputs)["kv_cache"]
    alone = [both.arguments(pipe, [given])["kv_cache"] for given in inputs]
    assert {block: k.shape[1] for block, (k, _) in made.items()} == {
        f"block_{n}": 6 + 2 * (n % 2 == 0) for n in range(4)
    }
    for block, pair in made.items():
        for side in (0, 1):
            parts = [cache[block][side] for cache in alone if block in cache]
            assert torch.equal(pair[side], torch.cat(parts, dim=1))


@pytest.mark.parametrize("name, make", [("lora", some_lora), ("extra_text_embedding", some_text)])
def test_what_several_templates_give_adds_up(name, make, load, pipe):
    gives = load(2)
    made = gives.arguments(pipe, [{"give": {name: make(seed)}} for seed in (0, 1)])
    if name == "lora":
        layer = "transformer_blocks.1.attn.to_v"
        update = made["lora"][f"{layer}.lora_B.weight"] @ made["lora"][f"{layer}.lora_A.weight"]
        parts = [some_lora(seed) for seed in (0, 1)]
        expected = sum(p[f"transformer.{layer}.lora_B.weight"] @ p[f"transformer.{layer}.lora_A.weight"] for p in parts)
        assert torch.allclose(update, expected, atol=1e-5)
    else:
        assert torch.equal(made[name], torch.cat([make(0), make(1)], dim=1))
    assert isinstance(pipe(PROMPT, **made, **SIZE), Image.Image)


def test_two_that_return_one_name_conflict_unless_one_wins(load, pipe, folders):
    gives = load(2, 2)
    inputs = [{"give": {"exponential_shift_mu": 0.1}}, {"model_id": 1, "give": {"exponential_shift_mu": 0.2}}]
    file = folders[2] / "model.py"
    both = rf"template_inputs\[0\] \({file}\) and template_inputs\[1\] \({file}\) both return 'exponential_shift_mu'"
    with pytest.raises(ValueError, match=f"{both}, and wins does not name.*wins={{'exponential_shift_mu': 0}}"):
        gives.arguments(pipe, inputs)
    with pytest.raises(ValueError, match=r"and wins=\{'exponential_shift_mu': 7\} is neither"):
        gives(pipe, prompt=PROMPT, template_inputs=inputs, wins={"exponential_shift_mu": 7}, **SIZE)
    assert gives.arguments(pipe, inputs, wins={"exponential_shift_mu": 1}) == {"exponential_shift_mu": 0.2}


def test_lazy_loading_holds_one_at_a_time_and_loads_each_once(load, pipe, monkeypatch):
    lazy, held, most, loads = load(0, 1, 2, lazy_loading=True), [], [0], []
    construct = template_model._construct

    def counted(code, seed):
        model = construct(code, seed)
        held.append(weakref.ref(model))
        loads.append(code.model.__name__)
        gc.collect()
        most[0] = max(most[0], sum(reference() is not None for reference in held))
        return model

    monkeypatch.setattr(template_model, "_construct", counted)
    sides = [{"model_id": n, "scale": 0.5, "give": {}} for n in (0, 1, 2, 1, 0)], [{"model_id": 0, "scale": 0.1}]
    sampled = lazy(pipe, *sides, prompt=PROMPT, **SIZE)
    assert loads == ["ScaleTemplate", "Template", "Gives"] and most == [1]
    monkeypatch.undo()
    assert np.array_equal(pixels(sampled), pixels(load(0, 1, 2)(pipe, *sides, prompt=PROMPT, **SIZE)))


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"model_id": 3}, r"template_inputs\[0\] has model_id 3, expected the number of one of 3 templates"),
        ({"model_id": "a"}, r"has model_id 'a', expected the number"),
        (
            {"model_id": 0},
            r"template_inputs\[0\] \(.*scale/model.py\): process_inputs needs 'scale'; it was given \[\]",
        ),
        ({"model_id": 2, "give": {"styl": 1}}, "returns 'styl', which QwenImagePipeline does not take"),
        ({"model_id": 2, "give": {"kv_cache": {"block_7": None}}}, r"gives/model.py\): kv_cache has 'block_7'"),
        (
            {"model_id": 2, "give": {"lora": {"x.lora_A.weight": torch.ones(1, 1)}}},
            "lora: 'x.lora_A.weight' belongs to no",
        ),
        (
            {"model_id": 2, "give": {"extra_text_embedding": torch.ones(1, 2)}},
            r"is \(1, 2\), expected a tensor of \(1, length, 128\)",
        ),
        ({"model_id": 2, "give": {"extra_text_embedding": torch.ones(1, 2, 128) / 0}}, "holds NaN or infinite"),
    ],
)
def test_what_cannot_be_sampled_is_named(inputs, message, load, pipe):
    with pytest.raises(ValueError, match=message):
        load(0, 1, 2)(pipe, prompt=PROMPT, template_inputs=[inputs], **SIZE)


def test_what_only_one_side_knows_cannot_be_of_the_other(load, pipe):
    with pytest.raises(ValueError, match=r"negative_template_inputs\[0\] .* returns 'negative_cfg_scale', which"):
        load(2).arguments(pipe, [], [{"give": {"cfg_scale": 2.0}}])


def test_what_is_given_and_made_is_refused(load, pipe):
    with pytest.raises(ValueError, match="kv_cache is given, and a template returns it, too"):
        load(0)(pipe, prompt=PROMPT, template_inputs=[{"scale": 0.1}], kv_cache={}, **SIZE)


def test_a_cache_that_is_passed_by_hand_is_checked(pipe):
    with pytest.raises(ValueError, match="QwenImagePipeline: kv_cache has 'double_0', which is no block"):
        pipe(PROMPT, kv_cache={"double_0": None}, **SIZE)


def test_a_template_that_is_not_in_order_is_refused_at_once(load, folders):
    (folders[0] / "model.py").write_text("TEMPLATE_MODEL = 1")
    with pytest.raises(ValueError, match="TEMPLATE_MODEL is 1"):
        load(0, lazy_loading=True)


# Command line ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def generate(tmp_path):
    """The pixels of a file and its parameters, as `python generate.py` samples it."""

    def sample(*overrides: str) -> tuple[np.ndarray, dict]:
        output = tmp_path / f"sampled-{len(list(tmp_path.iterdir()))}"
        small = [
            "options.num_inference_steps=2",
            "options.height=32",
            "options.width=32",
            "device=cpu",
            f"prompt={PROMPT}",
        ]
        cfg = tiny.compose("generate", *tiny.model_overrides(), *small, f"output={output}", *overrides)
        (path, *_) = tiny.call("generate", cfg)
        return np.array(Image.open(path), dtype=int), json.loads(Image.open(path).text["parameters"])

    return sample


def test_the_command_line_samples_with_templates(generate, folders):
    one = [f"template.path={folders[0]}", "template_inputs=[{scale: 0.8}]"]
    plain, _ = generate()
    sampled, parameters = generate(*one)
    guided, _ = generate(*one, "negative_template_inputs=[{scale: 0.2}]")
    assert not np.array_equal(plain, sampled) and not np.array_equal(sampled, guided)
    assert parameters["template_inputs"] == [{"scale": 0.8}] and parameters["negative_template_inputs"] == []
    assert parameters["templates"] == [str(folders[0] / "model.py")]
    several = [
        f"template.path=[{folders[0]},{folders[1]}]",
        "template_inputs=[{scale: 0.8}, {model_id: 1, scale: 0.1}]",
    ]
    assert not np.array_equal(generate(*several)[0], sampled)


def test_the_command_line_opens_files(generate, tmp_path):
    takes = GIVES.replace('return {"give": give}', 'return {"give": {"exponential_shift_mu": give.size[0] / 32}}')
    folder = templates.write(tmp_path / "takes", takes)
    sampled, parameters = generate(f"template.path={folder}", f"template_inputs=[{{give: {tiny.dataset()}/0.png}}]")
    assert np.array_equal(sampled, generate("+options.exponential_shift_mu=1.0")[0])
    assert parameters["template_inputs"][0]["give"].endswith("0.png")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["template_inputs=[{{scale: 1}}]"], "has model_id 0, expected the number of one of 0 templates"),
        (["template.path=gone"], "gone is no folder"),
        (["template.path={0}", "template_inputs=[{{scole: 1}}]"], "process_inputs needs 'scale'"),
        (["template.path={0}", "template_inputs=[0.8]"], r"template_inputs\[0\] is 0.8 \(float\); expected a mapping"),
    ],
)
def test_the_command_line_refuses_before_weights_are_read(overrides, message, generate, folders, monkeypatch):
    monkeypatch.setattr("diffsynth.diffusion.pipeline.networks.load_weights", None)
    with pytest.raises((ValueError, OSError), match=message):
        generate(*(override.format(folders[0]) for override in overrides))
