"""Frozen weights in fewer bits: what is kept, what it costs in memory and in exactness, and what is refused."""

import copy
import sys
import weakref

import pytest
import tiny
import torch
import warm
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from resumed import assert_same_run, final_weights, uninterrupted
from safetensors import safe_open
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffsynth.core.loader import ModelConfig, save_safetensors
from diffsynth.core.memory import MemoryRecipe
from diffsynth.core.memory.storage import restore, storable_layers, store, stored_layers
from diffsynth.core.memory.stored_linear import METHODS, StoredLinear
from diffsynth.diffusion.adapters import files as lora_files
from diffsynth.diffusion.adapters.lora import LoHa, LoKr, LoRA
from diffsynth.diffusion.distillation.roles import FakeScore
from diffsynth.diffusion.loss import DMD2, FlowMatchSFT
from diffsynth.diffusion.trained import TrainProgress
from diffsynth.diffusion.training_defaults import TrainingDefaults
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.pipelines.qwen_image import QwenImagePipeline

ADAPTER = LoRA(rank=4, target_modules="all-linear")
# Of the loss, relative, and one less the cosine of the gradients: about three times what these small models show.
TOLERANCES = {"fp8": (1e-2, 1e-3), "fp8_cast": (1e-2, 1e-3), "int8": (3e-3, 1e-4), "nf4": (2e-2, 1.5e-2)}
FEW_LAYERS = (1e-2, 1e-2)  # of fp8, where few layers are adapted
BITS = {"fp8": 8, "fp8_cast": 8, "int8": 8, "nf4": 4.5}
EVERY = pytest.mark.parametrize("storage", METHODS)


@pytest.fixture
def nf4():
    pytest.importorskip("bitsandbytes")


class Blocks(nn.Module):
    """Three blocks between two projections."""

    def __init__(self, width=128):
        super().__init__()
        self.first, self.last = nn.Linear(64, width), nn.Linear(width, 64)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width),
                    "up": nn.Linear(width, 2 * width),
                    "gate": nn.Linear(width, 4),
                    "down": nn.Linear(2 * width, width, bias=False),
                }
            )
            for _ in range(3)
        )

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](block["norm"](x))))
        return self.last(x)


def blocks() -> Blocks:
    torch.manual_seed(0)
    return Blocks().requires_grad_(False)


def shaken(module: PipelineTrainingModule) -> PipelineTrainingModule:
    """With adapters that do something."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.trainable_parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module


def losses_and_gradient(module, samples) -> tuple[torch.Tensor, torch.Tensor]:
    in_bf16 = module.pipe.torch_dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
        losses = module(samples)
    losses.sum().backward()
    gradients = [p.grad.flatten() for p in module.trainable_parameters() if p.grad is not None]
    return losses.detach(), torch.cat(gradients)


def assert_near(found, expected, tolerances: tuple[float, float]) -> None:
    of_loss, of_gradient = tolerances
    assert ((found[0] - expected[0]).abs() / expected[0]).max() < of_loss
    assert 1 - torch.cosine_similarity(found[1], expected[1], dim=0) < of_gradient
    assert not torch.equal(found[0], expected[0])


class Kernels(TorchDispatchMode):
    """Names of the operations that compute; views and allocations do not."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket not in (torch.ops.aten.view, torch.ops.aten.detach, torch.ops.aten.empty_like):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_is_decoded_in_one_kernel_and_rounded_once(dtype):
    peaks = torch.tensor([0.0, 1e-38, 1e-3, 1.0, 3e38])[:, None]
    weight = torch.cat([peaks, -peaks, peaks * torch.linspace(-1, 1, 500)], dim=1)
    layer = StoredLinear(nn.Linear(*reversed(weight.shape)), "int8")
    layer.load_state_dict(layer.encode(weight), strict=False)
    with Kernels() as kernels:
        found = layer.decode(dtype)
    cast = layer.bits.view(torch.int8).to(dtype)
    assert kernels.names == ["mul"] and found.dtype == dtype
    assert torch.equal(found, cast.mul_(layer.scale.view(torch.float32)))
    assert torch.equal(torch.compile(layer.decode, fullgraph=True, backend="aot_eager")(dtype), found)


# What is kept ---------------------------------------------------------------------------------------------------------


def test_linear_layers_of_blocks_are_stored_and_nothing_else():
    names = storable_layers(blocks())
    assert names == [f"blocks.{n}.{layer}" for n in range(3) for layer in ("up", "down")]
    assert storable_layers(blocks(), kept={"down"}) == [f"blocks.{n}.up" for n in range(3)]
    stored = store(blocks(), "fp8")
    assert [name for name, layer in stored.named_modules() if isinstance(layer, StoredLinear)] == names
    before = blocks().state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored.state_dict().items() if name in before)


@EVERY
@pytest.mark.usefixtures("nf4")
def test_bytes_are_known_from_shapes_alone(storage):
    layer = nn.ModuleList([nn.Linear(1024, 512, bias=False)])
    real = store(copy.deepcopy(layer), storage)
    meta = store(copy.deepcopy(layer).to("meta"), storage)
    with FakeTensorMode():
        fake = store(nn.ModuleList([nn.Linear(1024, 512, bias=False)]), storage)
    sizes = {sum(p.nbytes for p in module.parameters()) for module in (real, meta, fake)}
    assert len(sizes) == 1
    of_scales = 0 if storage in ("fp8_cast", "nf4") else 4 * 512
    assert sizes.pop() == BITS[storage] * 512 * 1024 / 8 + of_scales


def test_the_size_of_a_large_model_is_known_before_it_is_read():
    with init_empty_weights(include_buffers=False):
        dit = QwenImageTransformer2DModel(num_layers=6)
    whole = sum(parameter.numel() for parameter in dit.parameters())
    in_blocks = sum(dit.get_submodule(name).weight.numel() for name in storable_layers(dit))
    assert in_blocks / whole > 0.97
    store(dit, "fp8", torch.bfloat16)
    assert sum(p.nbytes if p.dtype == torch.uint8 else 0 for p in dit.parameters()) == in_blocks


@EVERY
@pytest.mark.usefixtures("nf4")
def test_a_cast_of_the_model_changes_only_what_weights_are_decoded_to(storage):
    stored, plain = store(blocks(), storage), blocks()
    cast = copy.deepcopy(stored).to(torch.bfloat16)
    for name, layer in stored_layers(cast).items():
        original = stored.get_submodule(name)
        assert all(torch.equal(getattr(layer, part), getattr(original, part)) for part in original.encode(layer.weight))
        assert (original.weight.dtype, layer.weight.dtype) == (torch.float32, torch.bfloat16)
        assert layer.weight.shape == plain.get_submodule(name).weight.shape
    assert cast(torch.ones(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_scale_for_each_channel_is_nearer_than_none_where_channels_differ():
    weight = 0.01 * torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    weight[::16] *= 100  # outliers; the other channels lie below 2⁻⁶, where e4m3 loses bits
    layer = nn.Linear(512, 256, bias=False)
    layer.weight.data = weight
    errors = {}
    for storage in ("fp8", "fp8_cast", "int8"):
        decoded = StoredLinear(layer, storage).weight
        errors[storage] = ((decoded - weight).norm(dim=1) / weight.norm(dim=1))[1::16].mean().item()
    assert errors["int8"] < errors["fp8"] < 0.75 * errors["fp8_cast"]
    assert errors["fp8"] < 0.03


def test_channels_of_zeros_and_weights_beyond_the_range_stay_finite():
    layer = nn.Linear(64, 64, bias=False)
    layer.weight.data = torch.zeros(64, 64)
    layer.weight.data[1] = 1e4
    for storage in ("fp8", "fp8_cast", "int8"):
        decoded = StoredLinear(layer, storage).weight
        assert decoded.isfinite().all() and not decoded[0].any()
    assert torch.equal(StoredLinear(layer, "fp8").weight, layer.weight)


@EVERY
@pytest.mark.usefixtures("nf4")
def test_restored_layers_answer_as_the_stored_ones(storage):
    stored = store(blocks(), storage)
    plain = restore(copy.deepcopy(stored))
    x = torch.randn(5, 64)
    assert not stored_layers(plain) and torch.equal(plain(x), stored(x))


# What a training makes of it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", tiny.mostly_slow(METHODS, "int8", "nf4"))
@pytest.mark.parametrize("torch_dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("nf4")
def test_losses_and_gradients_are_near_those_of_plain_weights(training_module, samples, storage, torch_dtype):
    plain = shaken(training_module(lora=ADAPTER, torch_dtype=torch_dtype))
    stored = shaken(training_module(lora=ADAPTER, torch_dtype=torch_dtype, storage=storage))
    assert stored.storages == {"dit": storage, "text_encoder": storage}
    assert all(stored_layers(stored.pipe.named_model(name)) for name in stored.storages)
    assert_near(losses_and_gradient(stored, samples), losses_and_gradient(plain, samples), TOLERANCES[storage])


@pytest.mark.parametrize("offload", [False, True])
def test_what_is_recomputed_is_the_same(training_module, samples, offload):
    options = {"lora": ADAPTER, "storage": "fp8", "offload_activations": offload}
    kept, again = (shaken(training_module(**options, checkpointing=mode)) for mode in ("none", "blocks"))
    for module in (kept, again):
        module.pipe.dit.train()
    found, expected = losses_and_gradient(again, samples), losses_and_gradient(kept, samples)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@EVERY
@pytest.mark.usefixtures("nf4")
def test_one_decoded_weight_lives_at_a_time(monkeypatch, storage):
    alive, most, decoded = [], [], StoredLinear.decode

    def decode(layer, dtype):
        weight = decoded(layer, dtype)
        alive.append(weakref.ref(weight))
        most.append(sum(reference() is not None for reference in alive))
        return weight

    monkeypatch.setattr(StoredLinear, "decode", decode)
    module, saved = store(blocks(), storage), []
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = module(x)
    y.sum().backward()
    assert most == [1] * 12  # six layers, forward and backward
    assert not [t for t in saved if t.shape in {(256, 128), (128, 256)}]


def test_compiled_layers_answer_the_same():
    module = store(blocks(), "fp8")
    x = torch.randn(3, 64, requires_grad=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    gradients = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (compiled, module)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "kind", [LoRA(rank=2, use_dora=True), LoHa(rank=2), LoKr(rank=2)], ids=["dora", "loha", "lokr"]
)
def test_every_kind_of_adapter_stands_on_stored_weights(training_module, samples, kind):
    plain, stored = (shaken(training_module(lora=kind, storage=storage)) for storage in ("none", "fp8"))
    assert_near(losses_and_gradient(stored, samples), losses_and_gradient(plain, samples), FEW_LAYERS)


def test_adapters_start_as_they_would_on_plain_weights(training_module):
    plain, stored = (
        training_module(lora=ADAPTER, torch_dtype="bfloat16", storage=storage) for storage in ("none", "fp8")
    )
    pairs = list(zip(plain.trainable_parameters(), stored.trainable_parameters(), strict=True))
    assert pairs and all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in pairs)


@pytest.mark.parametrize("storage", tiny.mostly_slow(METHODS, "int8", "nf4"))
@pytest.mark.usefixtures("nf4")
def test_an_adapter_is_exported_and_loaded_as_from_plain_weights(training_module, samples, tmp_path, storage):
    plain, stored = (shaken(training_module(lora=ADAPTER, storage=s)) for s in ("none", storage))
    files = {}
    for name, module in {"plain": plain, "stored": stored}.items():
        tensors, metadata = module.export_weights()["lora"]
        save_safetensors(tensors, files.setdefault(name, tmp_path / f"{name}.safetensors"), metadata)
        module.check_export(files[name])
    headers = [safe_open(file, "pt") for file in files.values()]
    assert headers[0].keys() == headers[1].keys() and headers[0].metadata() == headers[1].metadata()

    fresh = training_module(FlowMatchSFT(trainable_models=["vae"]), storage=storage)
    fresh.pipe.load_adapter(files["stored"])
    torch.testing.assert_close(fresh(samples), stored(samples))


def test_a_run_on_stored_weights_goes_on_as_if_nothing_had_been(tmp_path):
    overrides = ["memory=fp8", "max_steps=5", "checkpoint.every=2"]
    tiny.cut_off(3, tmp_path, *overrides)
    assert_same_run(tiny.train(tmp_path, *overrides), uninterrupted("memory=fp8"))


@pytest.mark.parametrize("full", [False, True], ids=["adapters", "full fake score"])
def test_roles_share_a_stored_base(training_module, samples, full):
    module = training_module(DMD2(fake_score=FakeScore(full=full)), ADAPTER, storage="fp8")
    assert stored_layers(module.pipe.dit)
    copies = module.role_networks
    assert bool(len(copies)) == full and not any(stored_layers(network) for network in copies.values())
    for step in range(2):  # the student's turn, then the fake score's
        module.zero_grad()
        module(samples, TrainProgress(step, 2)).sum().backward()
        gradients = [p.grad for p in module.trainable_parameters() if p.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.slow
def test_two_processes_train_on_stored_weights_as_one_does(tmp_path):
    plain = uninterrupted("memory=fp8", "micro_batch_size=2")
    overrides = tiny.merged(tiny.train_overrides(tmp_path), ["memory=fp8", "micro_batch_size=2", "max_steps=5"])
    assert warm.ranks(2, tiny.run, overrides) == [0, 0]
    (run_dir,) = tmp_path.iterdir()
    torch.testing.assert_close(final_weights(run_dir), final_weights(plain), rtol=1e-4, atol=1e-5)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.fixture
def unloaded(tiny, monkeypatch):
    """`unloaded(task, lora, **memory)`: a training module whose weights must not be read."""

    def fail(*_):
        raise AssertionError("weights were read")

    def build(task=None, lora=None, **memory):
        folders = {"dit": "transformer", "text_encoder": "text_encoder", "vae": "vae", "tokenizer": "tokenizer"}
        pipe = QwenImagePipeline.from_components(
            **{name: ModelConfig(path=tiny / folder) for name, folder in folders.items()},
            torch_dtype="float32",
            training=TrainingDefaults(lora_target_modules={"dit": ["to_q"]}),
        )
        with monkeypatch.context() as patched:
            patched.setattr("diffsynth.diffusion.pipeline.networks.load_weights", fail)
            return PipelineTrainingModule(pipe, task or FlowMatchSFT(), lora, memory=MemoryRecipe(**memory))

    return build


@pytest.mark.parametrize("trained", ["dit", "dit.transformer_blocks.1"])
def test_trained_weights_are_never_stored(unloaded, trained):
    task = FlowMatchSFT(trainable_models=[trained])
    for stored in (None, ["text_encoder", "dit"]):
        with pytest.raises(
            ValueError, match=rf"fp8.*{trained} is trained in full.*LoRA.*memory.stored=\[text_encoder\]"
        ):
            unloaded(task, storage="fp8", stored=stored)
    with pytest.raises(ValueError, match="memory.storage=none"):
        unloaded(task, storage="fp8", stored=["dit"])
    assert unloaded(task, storage="fp8", stored=["text_encoder"]).storages == {"text_encoder": "fp8"}


def test_models_that_cannot_be_stored_are_named(unloaded):
    with pytest.raises(ValueError, match="no model 'text_encodr'.*'vae'.*Did you mean 'text_encoder'"):
        unloaded(lora=ADAPTER, storage="fp8", stored=["text_encodr"])
    with pytest.raises(ValueError, match="vae has no linear layers in blocks"):
        unloaded(lora=ADAPTER, storage="fp8", stored=["vae"])
    with pytest.raises(ValueError, match=r"memory.stored names \['dit'\], but memory.storage is none"):
        MemoryRecipe(stored=["dit"])


def test_only_nf4_needs_bitsandbytes(unloaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r'nf4 needs bitsandbytes: pip install "diffsynth-hydra\[quant\]"'):
        unloaded(lora=ADAPTER, storage="nf4")
    assert unloaded(lora=ADAPTER, storage="fp8").storages
    assert all(store(blocks(), storage) for storage in METHODS if storage != "nf4")


def test_nothing_is_merged_into_stored_weights(training_module, unloaded, tmp_path):
    module = training_module(lora=ADAPTER, storage="fp8")
    tensors, metadata = module.export_weights()["lora"]
    save_safetensors(tensors, file := tmp_path / "lora.safetensors", metadata)
    lora_files.remove(module.pipe.dit)
    with pytest.raises(ValueError, match=r"fewer bits.*rounded away.*fuse.py"):
        module.pipe.load_adapter(file, fuse=True)
    preset = LoRA(rank=4, target_modules="all-linear", preset=str(file))
    with pytest.raises(ValueError, match=r"lora.preset.*dit.*memory.storage=fp8.*fuse.py"):
        unloaded(lora=preset, storage="fp8")
    assert unloaded(lora=preset, storage="fp8", stored=["text_encoder"]).storages
