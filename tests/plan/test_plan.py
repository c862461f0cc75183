"""A plan: what it says is what happens, and it says it without weights."""

import json
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from unittest import mock

import pytest
import tiny
import torch
from conftest import import_file
from PIL import Image
from torch.utils._pytree import tree_leaves

from diffsynth.core.data.dataset import PlainData
from diffsynth.core.live_bytes import LiveBytes, in_host_memory
from diffsynth.core.loader import ModelConfig, build_module
from diffsynth.core.memory import MemoryRecipe
from diffsynth.diffusion.architectures import architectures
from diffsynth.diffusion.pipeline import networks as models
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.plan import plan as plan_module
from diffsynth.plan.budget import Budget
from diffsynth.plan.few_blocks import FewBlocks
from diffsynth.plan.footprint import MemoryFootprint, static_footprint
from diffsynth.plan.meta_module import copied, read
from diffsynth.plan.optimizer_cost import OptimizerCost, optimizer_cost
from diffsynth.plan.options import Option
from diffsynth.plan.plan import Plan, Planner, StageMemory
from diffsynth.plan.rehearsal import Rehearsal
from diffsynth.plan.run import PlacedRun
from diffsynth.plan.shares import shares
from diffsynth.plan.show import table
from diffsynth.training.absent import NoEMA
from diffsynth.training.loop import Trainer
from diffsynth.training.run import Run
from diffsynth.training.validation.validation import BANDS, Validation

preflight = import_module("diffsynth.plan.preflight")  # its function has its name
BENCHMARK = tiny.ROOT / "benchmarks" / "plan.py"
SMALL_QWEN = {"_class_name": "QwenImageTransformer2DModel", "num_layers": 3, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def benchmark():
    return import_file(BENCHMARK)


# Live bytes -----------------------------------------------------------------------------------------------------------


def test_bytes_are_live_until_nobody_holds_them():
    with LiveBytes() as live:
        tensor = torch.zeros(1000)
        view = tensor[:10]
        del tensor
        assert live.device.now == 4000
        del view
        assert (live.device.now, live.device.peak, live.host.now) == (0, 4000, 0)


def test_what_waits_in_host_memory_is_counted_apart():
    with LiveBytes() as live:
        with in_host_memory():
            waiting = torch.zeros(10)
        assert (live.device.now, live.host.now) == (0, waiting.nbytes)


# The plan against what happens ----------------------------------------------------------------------------------------


def real_peak(benchmark, module: PipelineTrainingModule, row) -> int:
    """Bytes of live tensors at the peak of a module's second step.

    diffusers keeps a table of frequencies that is no buffer: no plan counts it, and 2 MB are much only for this model.
    """
    module.pipe.device = torch.device("cpu")
    module.load(cached=True)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    optimizer = benchmark.OPTIMIZER(module.trainable_parameters())
    benchmark.step(module, optimizer, row)
    with LiveBytes() as live:
        state = [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, torch.Tensor)]
        live.watch([*module.parameters(), *module.buffers(), *state])
        benchmark.step(module, optimizer, row)
    return live.device.peak - module.pipe.dit.pos_embed.pos_freqs.nbytes


@pytest.mark.parametrize("checkpointing", ["none", "attention", "blocks"])
@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_plan_is_within_five_per_cent_of_a_real_steps_live_tensors(benchmark, monkeypatch, training, checkpointing):
    monkeypatch.setitem(benchmark.CONFIGS, "qwen_image", {**SMALL_QWEN, "num_layers": 2})
    row = benchmark.row_of("qwen_image", 256)
    real = real_peak(benchmark, benchmark.module_of("qwen_image", training, checkpointing), row)
    planned = benchmark.predicted("qwen_image", training, checkpointing, 256)
    assert abs(planned / real - 1) < 0.05


def test_the_losses_of_a_validation_take_what_is_planned(benchmark, monkeypatch, tmp_path):
    monkeypatch.setitem(benchmark.CONFIGS, "qwen_image", {**SMALL_QWEN, "num_layers": 2})
    row, real = benchmark.row_of("qwen_image", 256), benchmark.module_of("qwen_image", "lora", "none")
    real.pipe.device = torch.device("cpu")
    real.load(cached=True)
    rope = real.pipe.dit.pos_embed
    with LiveBytes() as live, torch.no_grad(), torch.autocast("cpu", torch.bfloat16), real.pipe.sampling():
        live.watch([*real.parameters(), *real.buffers(), rope.pos_freqs, rope.neg_freqs])
        before = live.device.now
        Validation(tmp_path).losses(real, PlainData([row]))
    rehearsal = Rehearsal(read(benchmark.module_of("qwen_image", "lora", "none"), cached=True))
    planned = rehearsal.evaluate(row, BANDS).peak
    assert 0 <= planned - (live.device.peak - before) <= rope.pos_freqs.nbytes  # the rehearsal makes one of the tables
    assert planned > 2 * rehearsal.evaluate(row, 1).peak


def rehearsed(benchmark, monkeypatch, **recipe) -> tuple[MemoryFootprint, Rehearsal]:
    monkeypatch.setitem(benchmark.CONFIGS, "qwen_image", SMALL_QWEN)
    module = benchmark.module_of("qwen_image", "lora", "none")
    module = PipelineTrainingModule(module.pipe, module.task, module.lora, memory=MemoryRecipe(**recipe))
    rehearsal = Rehearsal(read(module, cached=True))
    passes = rehearsal.train([benchmark.row_of("qwen_image", 256)], accumulates=False)
    footprint = static_footprint(rehearsal.module, rehearsal.at_rest, rehearsal.unreached, benchmark.OPTIMIZER, NoEMA())
    return replace(footprint, working=passes.peak, activations=passes.activations, host=passes.host), rehearsal


def test_each_option_takes_from_the_device_what_it_says(benchmark, monkeypatch):
    plan = partial(rehearsed, benchmark, monkeypatch)
    plain, blocks = plan()[0], plan(checkpointing="blocks")[0]
    offloaded = plan(checkpointing="blocks", offload_activations=True)[0]
    assert plain.activations > blocks.activations > offloaded.activations
    assert (plain.host, blocks.host) == (0, 0) and offloaded.host > 0
    stored = plan(storage="fp8")[0]
    assert plain.frozen / 2 < stored.frozen < plain.frozen * 0.6  # what is outside of blocks stays
    streamed = plan(checkpointing="blocks", stream_blocks=3, stream_buffers=1)[0]
    assert 0.9 < (plain.frozen - streamed.frozen) / (2 * plain.block) < 1.1
    assert 0.9 < streamed.host / (3 * plain.block) < 1.1


MANY_BLOCKS = [
    pytest.param({"storage": "int8"}, 6, marks=pytest.mark.slow),
    ({"checkpointing": "blocks", "offload_activations": True}, 6),
    pytest.param({"checkpointing": "blocks", "checkpoint_every": 2}, 12, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("recipe, blocks", MANY_BLOCKS)
def test_few_blocks_tell_what_all_of_them_take(benchmark, monkeypatch, recipe, blocks):
    monkeypatch.setitem(benchmark.CONFIGS, "qwen_image", {**SMALL_QWEN, "num_layers": blocks})
    module = benchmark.module_of("qwen_image", "lora", "none")
    recipe = MemoryRecipe(**recipe)
    module = read(PipelineTrainingModule(module.pipe, module.task, module.lora, memory=recipe), cached=True)
    few, whole = FewBlocks(module, recipe), Rehearsal(copied(module, recipe))
    rows = [benchmark.row_of("qwen_image", 256)]
    told, taken = few.train(rows, accumulates=False), whole.train(rows, accumulates=False)
    assert not few.is_whole and few.at_rest == whole.at_rest and len(few.unreached) == len(whole.unreached) > 0
    for figure in ("peak", "activations", "host"):
        assert getattr(told, figure) == pytest.approx(getattr(taken, figure), rel=0.02)


REAL_WIDTHS = [
    ("qwen_image", "lora", "blocks", "256"),
    ("flux2_klein_4b", "lora", "none", "256"),
    ("flux2_klein_4b", "lora", "blocks", "512"),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", REAL_WIDTHS)
def test_a_plan_of_real_width_is_within_the_bounds_of_a_real_process(benchmark, case):
    """benchmarks/plan.py has the other cases, with weights trained in full and larger pictures."""
    figures = benchmark.figures(case)
    assert abs(figures["predicted"] / figures["live"] - 1) < 0.05
    assert abs(figures["predicted"] / figures["process"] - 1) < 0.15


# Parts of a plan ------------------------------------------------------------------------------------------------------


def test_released_architectures_have_the_released_numbers_of_weights():
    released = {
        "Qwen/Qwen-Image": (20_430_401_088, 8_292_166_656),
        "black-forest-labs/FLUX.2-klein-4B": (3_875_544_576,),
    }
    for repository, numbers in released.items():
        for name, count in zip(("transformer", "text_encoder"), numbers, strict=False):
            config = architectures()[repository][name]
            module = build_module(None, config)
            assert sum(parameter.numel() for parameter in module.parameters()) == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizers_cost_is_measured_not_known(dtype):
    adam = optimizer_cost(partial(torch.optim.AdamW, lr=1e-3), dtype, on_cuda=False)
    plain = optimizer_cost(partial(torch.optim.SGD, lr=1e-3), dtype, on_cuda=False)
    assert (round(adam.state), plain.state) == (8, 0)
    at_once = 10 if dtype == torch.float32 else 1000  # bf16 weights get fp32 copies, a few tensors at a time
    assert adam.update(total=1000, largest=10) == pytest.approx(at_once * adam.transient, abs=1)


def test_on_cuda_all_tensors_are_stepped_at_once_and_in_one_kernel_nothing_is_copied():
    def cost(optimizer, **options) -> OptimizerCost:
        return optimizer_cost(partial(optimizer, lr=1e-3, **options), torch.float32, on_cuda=True)

    fused, together, alone = cost(torch.optim.AdamW), cost(torch.optim.RMSprop), cost(torch.optim.AdamW, foreach=False)
    assert together.update(total=1000, largest=10) == 1000 * together.transient > 0
    assert alone.update(total=1000, largest=10) == 10 * alone.transient > 0
    assert fused.update(total=1000, largest=10) == 0


HELD = MemoryFootprint(1000, 100, 100, 200, 0, 0, block=50, master_weights=100, encoders=300, working=150)


def test_one_device_holds_everything_and_sharding_engines_less_the_more_there_are():
    alone = {share.engine: share for share in shares(HELD, 1)}
    assert alone["ddp"].device == HELD.peak == 1000 + 100 + 200 + 150
    for few, many in zip(shares(HELD, 2), shares(HELD, 8), strict=True):
        assert few.engine == many.engine
        if few.engine == "ddp":
            assert few.device == many.device == HELD.peak + HELD.gradients
        else:
            assert (few.device, few.host) >= (many.device, many.host)
    assert {s.engine for s in shares(HELD, 8) if s.host} == {"zero2_offload", "zero3_offload"}


def test_encoders_are_not_sharded():
    shared = {share.engine: share.device for share in shares(HELD, 10**9)}
    assert shared["fsdp2"] == 300 + 2 * 50 + 50 + 2  # encoders, two blocks, activations, a byte of each part
    assert shared["zero2"] == 1100 + 50 + 2


def test_what_a_gpu_needs_is_said_of_training_and_of_the_cache():
    stages = [StageMemory("train", peak=2 << 30), StageMemory("save", peak=1 << 30), StageMemory("cache", peak=4 << 30)]
    whole = Plan(stages, HELD, [], 0)
    assert table(whole, lambda peak: 2 * peak).endswith("(an estimate): training 4.00 GiB; make_cache.py 8.00 GiB.")
    assert table(replace(whole, stages=stages[:2]), lambda peak: peak).endswith("(an estimate): training 2.00 GiB.")


# Commands -------------------------------------------------------------------------------------------------------------


def plan(tmp_path, *overrides: str) -> dict:
    """What `python plan.py` writes."""
    given = [*tiny.train_overrides(tmp_path), f"path={tmp_path / 'plan'}", "batch_size=1", "cache_batch_size=1"]
    cfg = tiny.compose("plan", *tiny.merged(given, overrides))
    assert "| train |" in tiny.call("plan", cfg)
    assert (tmp_path / "plan" / "plan.svg").read_text().startswith("<svg")
    return json.loads((tmp_path / "plan" / "plan.json").read_text())


def test_every_stage_is_planned_and_no_run_is_begun(tmp_path):
    held_out = f"{{_target_: diffsynth.core.data.UnifiedDataset.from_folder, path: {tiny.dataset()}}}"
    validated = ["validation=base", "validation.prompts=[a cat]", f"+validation.datasets.held_out={held_out}"]
    found = plan(tmp_path, "devices=[1,2]", "memory.checkpointing=blocks", *validated)
    assert [stage["name"] for stage in found["stages"]] == ["train", "evaluate", "sample", "save", "cache"]
    assert {share["devices"] for share in found["shares"]} == {1, 2}
    assert found["download"] == 0 and found["peak"] > found["footprint"]["trained"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_a_run_without_checkpoints_whose_blocks_are_compiled_is_planned_before_its_cache_is_made(tmp_path):
    stages = plan(tmp_path, "~checkpoint", "memory.compile=blocks", "cached=true")["stages"]
    disk = {stage["name"]: stage["disk"] for stage in stages}
    assert disk.keys() == {"train", "save", "cache"} and disk["cache"] > 0


def test_every_size_is_planned_the_worst_first(tmp_path):
    folder = tmp_path / "data"
    tiny.write_dataset(folder)
    Image.new("RGB", (64, 48)).save(folder / "0.png")
    sizes = [f"dataset.path={folder}", "dataset.height=null", "dataset.width=null"]
    of_buckets, of_rows = (
        [stage for stage in plan(tmp_path, *sizes, *more)["stages"] if stage["name"] == "train"]
        for more in (["dataset.buckets=true", "dataset.max_pixels=[1024,3072]"], ["dataset.buckets=false"])
    )
    assert [stage["size"] for stage in of_buckets] == [[64, 48], [32, 32]]
    assert of_buckets[0]["peak"] > of_buckets[1]["peak"]
    assert [stage["size"] for stage in of_rows] == [None]  # each has its own, of which the largest counts
    assert of_rows[0]["peak"] == of_buckets[0]["peak"]


@pytest.mark.slow
def test_a_training_from_a_cache_is_planned_before_there_is_one(tmp_path):
    own, cached = (plan(tmp_path, f"cached={flag}") for flag in ("false", "true"))
    made, found = tmp_path / "cache", tmp_path / "from_cache"
    tiny.make_cache(made)
    real = plan(found, "dataset=cache", f"dataset.path={made}")
    assert cached["footprint"]["encoders"] == real["footprint"]["encoders"] == 0 < own["footprint"]["encoders"]
    assert (
        cached["footprint"]["frozen"]
        == real["footprint"]["frozen"]
        == own["footprint"]["frozen"] - own["footprint"]["encoders"]
    )
    assert cached["peak"] < own["peak"]


def planner_of(tmp_path, cached: bool = False) -> Planner:
    parts = tiny.build(tiny.compose("train", *tiny.merged(tiny.train_overrides(tmp_path), ["batch_size=1"])))
    parts["dataset"].scan(required=())
    names = Run.__dataclass_fields__.keys() & parts.keys()
    return Planner(PlacedRun(**{name: parts[name] for name in names}, cached=cached, on_cuda=False))


def test_devices_that_have_a_samples_tokens_together_keep_their_part_of_the_activations(tmp_path):
    alone = planner_of(tmp_path, cached=True)
    spread = [replace(alone.run, processes=count, cp_size=count) for count in (2, 3)]
    together, apart = (Planner(run, alone.meta_modules) for run in spread)
    (size,) = alone.run.sizes
    part = together.footprint(size).activations / alone.footprint(size).activations
    assert 0.5 <= part < 0.6  # what is known of the time and the places is on both
    assert {share.devices for share in together.plan([1, 2, 3, 4], largest_only=True).shares} == {2, 4}
    with pytest.raises(ValueError, match="4 heads, which cp_size=3 does not divide"):
        apart.footprint(size)


def test_a_budget_takes_the_fastest_that_fits_and_says_why(tmp_path):
    planner = planner_of(tmp_path, cached=True)
    whole = planner.plan(largest_only=True).worst.peak
    budget = Budget(planner, whole)
    assert budget.choose().option.slowdown == 1
    choice = replace(budget, device=whole - 1).choose()
    assert choice.option.slowdown > 1 and choice.need.device < whole
    assert f"{choice.option.slowdown:.2f} times as long" in choice.why and "would need" in choice.why
    chosen = planner.variant(choice.option.recipe, choice.option.micro_batch_size)
    assert chosen.plan(largest_only=True).worst.peak == choice.need.device


@pytest.mark.slow
def test_what_streaming_spares_is_known_without_streaming(tmp_path):
    budget = Budget(planner_of(tmp_path, cached=True), device=0)
    recipe = replace(budget.run.memory, checkpointing="blocks", stream_blocks=4, stream_buffers=1)
    streamed = Option(recipe, micro_batch_size=1, slowdown=1)
    estimated, rehearsed = budget.estimate(streamed), budget.need(budget.plan(streamed))
    assert estimated.device == pytest.approx(rehearsed.device, rel=0.005)
    assert estimated.host == pytest.approx(rehearsed.host, rel=0.005)
    assert estimated.device < budget.estimate(replace(streamed, recipe=replace(recipe, stream_blocks=0))).device


def test_a_budget_that_nothing_fits_says_what_is_missing_and_what_would_help(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    budget = Budget(planner_of(tmp_path), 1000)
    assert {option.recipe.storage for option in budget.options.all()} == {"none", "int8"}
    with pytest.raises(ValueError, match=r"Nothing fits memory.budget=0 MiB; the least is") as refused:
        budget.choose()
    remedies = str(refused.value).partition("What would help:")[2]
    assert all(part in remedies for part in ("- memory.budget=", "nf4 needs bitsandbytes: pip install", "a cache"))


def test_what_was_chosen_is_written_into_the_run_and_trained_with(tmp_path):
    whole = planner_of(tmp_path).plan(largest_only=True).worst.peak
    run_dir = tiny.train(tmp_path, f"memory.budget={whole - 1}", "memory.check=false", "batch_size=1")
    chosen = json.loads((run_dir / "memory.json").read_text())
    assert chosen["device_bytes"] < whole and chosen["recipe"]["budget"] == whole - 1
    assert (run_dir / "finished.json").exists()


def test_a_network_of_many_blocks_is_planned_from_few_and_the_plan_is_the_same(monkeypatch, tmp_path):
    whole = planner_of(tmp_path)
    assert whole.quickest() is whole
    monkeypatch.setattr(plan_module, "MANY_BLOCKS", 4)
    monkeypatch.setattr(FewBlocks, "is_long", lambda few, blocks: len(blocks) > 3)
    quick = whole.quickest()
    assert isinstance(quick.rehearsal, FewBlocks) and not quick.rehearsal.is_whole
    found, expected = (planner.plan(largest_only=True) for planner in (quick, whole))
    assert found.worst.peak == pytest.approx(expected.worst.peak, rel=0.01)
    assert found.footprint.activations == pytest.approx(expected.footprint.activations, rel=0.01)


def test_only_the_first_process_judges_whether_a_run_is_small(tmp_path, monkeypatch):
    """Processes whose GPUs have unequal room would otherwise meet in different collectives, and wait for ever."""
    settled = planner_of(tmp_path).run.memory, 3
    monkeypatch.setattr(preflight, "free_bytes", lambda device: pytest.fail("judges by itself"))
    monkeypatch.setattr(preflight, "broadcast_object_list", lambda found: [settled])
    another = SimpleNamespace(device=torch.device("cpu"), is_main_process=False, num_processes=2)
    run = Run(**tiny.build(tiny.compose("train", *tiny.train_overrides(tmp_path))))
    assert preflight.preflight(run, another, SimpleNamespace(file="ddp", cp_size=1)).micro_batch_size == 3


@pytest.mark.parametrize(
    "overrides, is_small",
    [
        ([], True),
        (["dataset.height=8192", "dataset.width=8192"], False),
        (["batch_size=100000"], False),
        (
            ["validation=base", "validation.prompts=[a]", "+validation.options={height:null,width:null}"],
            False,
        ),  # 1328 x 1328
        (["validation=base", "validation.prompts=[a]", "+validation.options={height:8192,width:8192}"], False),
        (["lora=none"], True),
    ],
)
def test_a_run_is_small_only_if_its_images_are_too(overrides, is_small, tmp_path):
    parts = tiny.build(tiny.compose("train", *tiny.merged(tiny.train_overrides(tmp_path), overrides)))
    parts["dataset"].scan(required=())
    run = PlacedRun(**{name: parts[name] for name in Run.__dataclass_fields__.keys() & parts.keys()}, on_cuda=False)
    assert preflight.is_small(run, 16 * 2**30) == is_small


@pytest.mark.parametrize(
    "side, answer",
    [
        (
            32768,
            r"One image of 32768 x 32768 pixels takes 12.0 GiB by itself, and 4.0 GiB are free",
        ),
        pytest.param(8192, r"needs 2\d\.\d GiB on cpu, which has 4.0 GiB free: set memory", marks=pytest.mark.slow),
    ],
)
def test_pictures_that_cannot_fit_are_refused_though_the_weights_are_small(side, answer, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 4 * 2**30)
    monkeypatch.setattr(Trainer, "of", lambda *_: pytest.fail("goes on"))
    with pytest.raises(ValueError, match=answer) as refused:
        tiny.train(tmp_path, f"dataset.height={side}", f"dataset.width={side}", "batch_size=1")
    assert "\n" not in str(refused.value)


def test_a_run_that_cannot_fit_is_refused_before_weights_are_downloaded_or_load(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 1 << 20)
    read = mock.Mock(wraps=models.load_weights)
    monkeypatch.setattr(models, "load_weights", read)
    monkeypatch.setattr(ModelConfig, "is_to_be_downloaded", True)
    monkeypatch.setattr(ModelConfig, "resolve", lambda part: pytest.fail("downloads"))
    with pytest.raises(ValueError, match=r"needs .* on cpu, which has 1 MiB free: set memory.budget"):
        tiny.train(tmp_path)
    assert all(call.args[1] is None for call in read.call_args_list)  # sketches alone, which have no files
