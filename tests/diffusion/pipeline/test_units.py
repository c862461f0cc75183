from dataclasses import dataclass

import pytest

from diffsynth.diffusion.base_pipeline import BasePipeline, PipelineUnit
from diffsynth.diffusion.pipeline.components import Network
from diffsynth.diffusion.pipeline.request import ImageRequest
from diffsynth.diffusion.pipeline.units import required_units, run_units, run_units_together
from diffsynth.diffusion.pipeline.vae import Latents


@dataclass(kw_only=True)
class Request(ImageRequest):
    steps: int = 4


class Pipeline(BasePipeline):
    request = Request
    components = {"dit": Network("Nothing")}
    latents = Latents(channels=1, factor=1)
    unit_classes = ()
    model_fn = sigma_grid = staticmethod(lambda *_: None)


def run(units, shared=None, posi=None, nega=None):
    return run_units(units if isinstance(units, list) else [units], Pipeline(), shared or {}, posi or {}, nega or {})


class Noise(PipelineUnit):
    def __init__(self, **declared):
        super().__init__(output_params=("noise",), **declared)

    def process(self, pipe, length, steps, scale=2):
        return {"noise": (length, steps, scale)}


class Embed(PipelineUnit):
    def __init__(self, **spelling):
        super().__init__(
            input_params_posi={"text": "prompt"},
            input_params_nega={"text": "negative_prompt"},
            output_params=("embedding",),
            onload_model_names=("text_encoder",),
            **spelling,
        )
        self.encoded = []

    def process(self, pipe, text, steps):
        self.encoded.append(text)
        return {"embedding": text.upper() * steps}


# What a unit reads ---------------------------------------------------------------------------------------------------


def test_inputs_are_the_parameters_of_process():
    assert Noise().input_params == ("length", "steps", "scale")
    assert Embed(separate_cfg=True).fetch_input_params() == ["negative_prompt", "prompt", "steps"]


def test_an_input_nobody_set_takes_the_pipelines_default_then_the_units():
    shared, _, _ = run(Noise(), {"length": 8})
    assert shared == {"length": 8, "noise": (8, 4, 2)}


def test_what_is_given_wins_over_defaults_even_if_none():
    shared, _, _ = run(Noise(), {"length": 8, "steps": None, "scale": 5})
    assert shared["noise"] == (8, None, 5)


def test_a_missing_input_is_named_with_what_is_there():
    with pytest.raises(ValueError, match=r"Noise needs 'length'; have \['lenght', 'width'\]. Did you mean 'lenght'\?"):
        run(Noise(), {"lenght": 8, "width": 8})


def test_a_missing_prompt_is_named_with_its_unit():
    with pytest.raises(ValueError, match=r"Embed needs 'prompt'; have \['promt'\]"):
        run(Embed(separate_cfg=True), {}, {"promt": "a"})


def test_declared_inputs_are_checked_against_process():
    assert Noise(input_params=("scale", "length", "steps")).input_params == ("length", "steps", "scale")
    with pytest.raises(ValueError, match=r"Noise declares .* differ in \['scale', 'size'\]"):
        Noise(input_params=("size", "length", "steps"))


# What a unit returns -------------------------------------------------------------------------------------------------


def test_outputs_nobody_declared_are_refused():
    class Undeclared(Noise):
        def process(self, pipe):
            return {"noise": 0, "nois": 1}

    with pytest.raises(ValueError, match=r"Undeclared returned \['nois'\].*\('noise',\)"):
        run(Undeclared())


def test_a_unit_may_return_nothing():
    class Optional(Noise):
        def process(self, pipe):
            return {}

    assert run(Optional(), {"a": 1}) == ({"a": 1}, {}, {})


def test_later_units_read_what_earlier_ones_return_and_the_callers_dictionaries_stay():
    class Double(PipelineUnit):
        def process(self, pipe, noise):
            return {"noise": noise * 2}

    given = {"length": 8}
    shared, _, _ = run([Noise(), Double(output_params=("noise",))], given)
    assert shared["noise"] == (8, 4, 2, 8, 4, 2)
    assert given == {"length": 8}


# The two sides of guidance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["separate_cfg", "seperate_cfg"])
def test_with_guidance_both_prompts_are_encoded(spelling):
    unit = Embed(**{spelling: True})
    _, posi, nega = run(unit, {"cfg_scale": 3, "steps": 2}, {"prompt": "a"}, {"negative_prompt": "b"})
    assert (posi["embedding"], nega["embedding"]) == ("AA", "BB")


@pytest.mark.parametrize("shared", [{"cfg_scale": 1}, {"cfg_scale": 1.0}, {}])
def test_without_guidance_the_negative_prompt_is_not_encoded(shared):
    unit = Embed(separate_cfg=True)
    _, posi, nega = run(unit, shared, {"prompt": "a"}, {"negative_prompt": "b"})
    assert unit.encoded == ["a"]
    assert nega["embedding"] == posi["embedding"]


def test_a_unit_that_takes_over_gets_and_returns_all_three():
    class Swap(PipelineUnit):
        def process(self, pipe, inputs_shared, inputs_posi, inputs_nega):
            return {**inputs_shared, "swapped": True}, inputs_nega, inputs_posi

    unit = Swap(take_over=True, input_params=("anything",), output_params=("swapped",))
    assert run(unit, {}, {"a": 1}, {"b": 2}) == ({"swapped": True}, {"b": 2}, {"a": 1})
    assert unit.fetch_input_params() == ["anything"]


class EmbedTogether(Embed):
    def process_batch(self, pipe, batch):
        self.encoded.append(len(batch))
        return [{"embedding": each["text"].upper() * each["steps"]} for each in batch]


class Doubled(Noise):
    def process_batch(self, pipe, batch):
        return [{"noise": (each["length"], each["steps"], each.get("scale", 2))} for each in batch]


@pytest.mark.parametrize("cfg_scale", [1, 4])
def test_several_samples_are_to_units_what_each_is_alone(cfg_scale):
    together = EmbedTogether(separate_cfg=True)
    units, pipe = [Noise(), together, Doubled()], Pipeline()
    shared = [{"length": length, "cfg_scale": cfg_scale} for length in (8, 16, 24)]
    samples = [(own, {"prompt": f"a {own['length']}"}, {"negative_prompt": "x"}) for own in shared]
    assert run_units_together(units, pipe, samples) == [run_units(units, pipe, *sample) for sample in samples]
    assert (together.encoded[:1] == [3]) == (cfg_scale == 1)


# Which units a purpose needs -----------------------------------------------------------------------------------------


def test_only_the_units_that_lead_to_what_is_wanted_are_required():
    class Reads(PipelineUnit):
        def process(self, pipe, noise): ...

    noise, embed = Noise(), Embed(separate_cfg=True)
    latents, unrelated = Reads(output_params=("latents",)), Reads(output_params=("mask",))
    units = [noise, embed, latents, unrelated]
    assert required_units(units, {"latents"}) == [noise, latents]
    assert required_units(units, {"embedding", "mask"}) == [noise, embed, unrelated]
    assert required_units(units, {"length"}) == []


def test_a_unit_that_takes_over_may_do_anything_and_is_always_required():
    class Any(PipelineUnit):
        def process(self, pipe, inputs_shared, inputs_posi, inputs_nega): ...

    noise, anything = Noise(), Any(take_over=True, input_params=("noise",))
    assert required_units([noise, anything], {"embedding"}) == [noise, anything]


def test_only_the_models_of_the_units_and_of_the_network_are_needed():
    embed = Embed(separate_cfg=True)
    assert Pipeline().models_of([embed, Noise()], model_fn=False) == {"text_encoder"}
    assert Pipeline().models_of([embed], model_fn=True) == {"text_encoder", "dit"}
