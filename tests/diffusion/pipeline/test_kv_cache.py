"""Keys and values from outside in the attention of a base model, and LoRAs and text as inputs."""

import copy
import pickle

import pytest
import tiny_flux2
import torch
from bases import Base, Flux1Base, Flux2Base, load, some
from miniatures import flux1
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffsynth.core.data import collate
from diffsynth.diffusion.adapters.names import LayerNames
from diffsynth.diffusion.pipeline import attention, kv_cache
from diffsynth.diffusion.template import lora
from diffsynth.diffusion.template.cache import append_text

NAMES = LayerNames(prefix="transformer")
LENGTH = 5  # of the further keys
CHECKPOINTING = [{}, {"use_gradient_checkpointing": True}, {"use_gradient_checkpointing_offload": True}]


@pytest.fixture(params=[Base, Flux2Base, pytest.param(Flux1Base, marks=pytest.mark.slow)])
def base(request, tiny) -> Base:
    folders = {Base: lambda: tiny, Flux2Base: tiny_flux2.klein, Flux1Base: flux1.dev}
    return load(request.param, folders[request.param]())


def parts(inputs: dict, row: int) -> dict:
    return {name: tuple(tensor[row : row + 1] for tensor in pair) for name, pair in inputs.items()}


# Keys and values ------------------------------------------------------------------------------------------------------


def test_blocks_are_named_as_their_users_name_them(base):
    heads = base.dit.config.num_attention_heads, base.dit.config.attention_head_dim
    assert kv_cache.blocks_of(base.dit) == dict.fromkeys(base.blocks(), heads)
    assert {name.split("_")[0] for name in base.blocks()} == set(base.stock)


@pytest.mark.parametrize("rows", [slice(None), slice(0, 1)])
def test_an_empty_cache_changes_not_a_bit(rows, base):
    plain = base(rows)
    assert torch.equal(base(rows, kv_cache={}), plain)
    nothing = parts(base.cache(length=0), 0) if rows.stop else base.cache(length=0)
    assert torch.equal(base(rows, kv_cache=nothing), plain)  # through our own arithmetic


@pytest.mark.parametrize("rows", [slice(None), slice(0, 1)])
def test_without_a_cache_the_arithmetic_is_the_librarys(rows, base):
    ours = base(rows)
    for name, block in base.blocks().items():
        block.attn.set_processor(base.stock[name.split("_")[0]]())
    base.dit.pos_embed._forward_hooks.clear()  # the processor of Qwen-Image reads real tables
    assert torch.equal(base(rows), ours)


def test_every_block_reads_its_own_entry(base):
    plain, cache = base(), base.cache()
    for block in cache:
        assert not torch.allclose(base(kv_cache={block: cache[block]}), plain, atol=1e-4)


def test_further_keys_come_last_and_are_attended_to_wherever_the_text_is_padded(base, monkeypatch):
    seen, dispatch = [], attention.dispatch_attention_fn
    monkeypatch.setattr(
        attention,
        "dispatch_attention_fn",
        lambda *args, **options: seen.append((*args, options)) or dispatch(*args, **options),
    )
    cache = base.cache()
    base(kv_cache=cache)
    assert len(seen) == len(cache)
    for (query, key, value, options), entry in zip(seen, cache.values(), strict=True):
        assert torch.equal(key[:, -LENGTH:], entry[0]) and torch.equal(value[:, -LENGTH:], entry[1])
        assert key.shape[1] == query.shape[1] + LENGTH
        if base.padded != Flux2Base.padded:
            mask = options["attn_mask"][:, 0, 0]
            assert mask.shape == key.shape[:2] and torch.equal(mask[:, :9], base.batch["prompt_emb_mask"])
            assert mask[:, 9:].all()


def test_a_batch_is_its_samples(base):
    """Two of which have padded prompts: what is padding there must not take the place of further keys."""
    cache = base.cache()
    together = base(kv_cache=cache)
    for row in range(3):
        assert torch.allclose(together[row : row + 1], base(slice(row, row + 1), kv_cache=parts(cache, row)), atol=1e-5)


def test_one_entry_serves_a_whole_batch(base):
    one = base.cache(batch=1)
    repeated = {block: tuple(tensor.repeat(3, 1, 1, 1) for tensor in pair) for block, pair in one.items()}
    assert torch.allclose(base(kv_cache=one), base(kv_cache=repeated), atol=1e-6)


def gradients(base: Base, name: str, given: dict, **inputs) -> dict[str, Tensor]:
    leaves = {key: tuple(tensor.clone().requires_grad_() for tensor in pair) for key, pair in given.items()}
    base(**{name: leaves}, **inputs).square().mean().backward()
    found = {f"{key}/{side}": tensor.grad for key, pair in leaves.items() for side, tensor in enumerate(pair)}
    return {key: torch.zeros(()) if gradient is None else gradient for key, gradient in found.items()}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING[1:])
@pytest.mark.parametrize("name", ["kv_cache", "lora"])
def test_gradients_reach_every_tensor_and_checkpointing_does_not_change_them(checkpointing, name, base):
    given = base.cache() if name == "kv_cache" else lora_of(base.dit)
    base.dit.requires_grad_(False)
    plain, recomputed = gradients(base, name, given), gradients(base, name, given, **checkpointing)
    unread = {f"transformer_blocks.{len(base.dit.transformer_blocks) - 1}.{name}" for name in base.unread}
    for key, gradient in plain.items():
        assert gradient.abs().max() > 0 or key.split("/")[0] in unread, key
        assert torch.allclose(gradient, recomputed[key], atol=1e-7), key


def test_processors_travel_with_the_network(base):
    copied, unpickled = copy.deepcopy(base.dit), pickle.loads(pickle.dumps(base.dit))
    assert kv_cache.blocks_of(copied) == kv_cache.blocks_of(unpickled) == kv_cache.blocks_of(base.dit)


def test_caches_of_several_templates_stand_one_after_the_other(base):
    one, other, *_ = base.blocks()
    first, second = base.cache(length=2), {other: base.cache(length=3)[other]}
    merged = kv_cache.merge([first, second])
    assert merged.keys() == first.keys() and merged[one][0].shape[1] == 2
    assert torch.equal(merged[other][1], torch.cat([first[other][1], second[other][1]], dim=1))


PAIR = torch.zeros(1, LENGTH, 4, 32)
WRONG = [
    ([PAIR], "kv_cache is a list, expected a dict"),
    (
        {"double_0": (PAIR, PAIR)},
        "'double_0', which is no block of QwenImageTransformer2DModel; expected some of block_0",
    ),
    ({"blok_2": (PAIR, PAIR)}, "'blok_2', which is no block of QwenImageTransformer2DModel; nearest: 'block_2'"),
    ({"block_0": PAIR}, r"kv_cache\['block_0'\] is a Tensor, expected a pair"),
    (
        {"block_0": (PAIR, PAIR[:, :3])},
        r"k \(1, 5, 4, 32\) and v \(1, 3, 4, 32\); expected two of \(batch, length, 4, 32\)",
    ),
    ({"block_0": (PAIR[0], PAIR[0])}, r"k \(5, 4, 32\)"),
    ({"block_1": (PAIR, PAIR / 0)}, r"kv_cache\['block_1'\] v holds NaN or infinite values"),
]


@pytest.mark.parametrize("base", [Base], indirect=True)
@pytest.mark.parametrize("given, message", WRONG)
def test_what_no_block_can_read_is_refused_with_what_it_expects(given, message, base):
    assert base.dit.config.num_attention_heads == 4 and base.dit.config.attention_head_dim == 32
    with pytest.raises(ValueError, match=f"mine: .*{message}"):
        kv_cache.check(given, base.dit, "mine")


def test_a_network_that_reads_none_says_so():
    with pytest.raises(ValueError, match="no block of Linear reads a kv_cache"):
        kv_cache.check({"block_0": (PAIR, PAIR)}, nn.Linear(1, 1), "mine")


# LoRA -----------------------------------------------------------------------------------------------------------------


def layers_of(dit: nn.Module) -> list[str]:
    """Layers inside of blocks and outside, seen with and without a dimension of tokens."""
    return [name for name, layer in dit.named_modules() if isinstance(layer, nn.Linear)]


def lora_of(dit: nn.Module, batch: int = 3, rank: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    layers = {name: dit.get_submodule(name) for name in layers_of(dit)}
    return {
        name: (some(batch, rank, layer.in_features) / 8, some(batch, layer.out_features, rank, seed=1) / 8)
        for name, layer in layers.items()
    }


def state_dict_of(lora: dict, row: int = 0, prefix: str = "transformer.") -> dict[str, Tensor]:
    sides = {name: dict(zip("AB", pair, strict=True)) for name, pair in lora.items()}
    return {f"{prefix}{n}.lora_{s}.weight": tensor[row] for n, pair in sides.items() for s, tensor in pair.items()}


def merged_into(dit: nn.Module, lora: dict, row: int) -> nn.Module:
    dit = copy.deepcopy(dit)
    for name, (down, up) in lora.items():
        dit.get_submodule(name).weight.data += up[row] @ down[row]
    return dit


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_each_sample_has_its_own_lora(checkpointing, base):
    lora, dit = lora_of(base.dit), base.dit
    together = base(lora=lora, **checkpointing)
    for row in range(3):
        base.dit = merged_into(dit, lora, row)
        assert torch.allclose(together[row : row + 1], base(slice(row, row + 1)), atol=1e-4)


def hooks_of(network: nn.Module) -> list:
    return [hook for module in network.modules() for hook in module._forward_hooks.values()]


def test_a_lora_leaves_no_trace(base):
    plain, run, hooks = base(), base.dit._gradient_checkpointing_func, hooks_of(base.dit)
    base(lora=lora_of(base.dit))
    assert base.dit._gradient_checkpointing_func.__qualname__ == run.__qualname__
    assert torch.equal(base(), plain)
    assert hooks_of(base.dit) == hooks


def test_loras_of_several_templates_add_up(base):
    names = ["transformer_blocks.0.attn.to_q", "norm_out.linear"]
    whole = lora_of(base.dit, batch=1)
    first, second = {n: whole[n] for n in names}, {names[0]: tuple(2 * t for t in whole[names[0]])}
    merged = lora.merge([state_dict_of(first), state_dict_of(second, prefix="")], base.dit, NAMES)
    summed = lora.read(merged, base.dit, NAMES, "mine")
    assert summed[names[0]][0].shape[1] == 4
    base.dit, plain = merged_into(merged_into(base.dit, first, 0), second, 0), base.dit
    expected, base.dit = base(), plain
    assert torch.allclose(base(lora=summed), expected, atol=1e-4)


def test_scales_of_other_formats_are_folded_in(base):
    name = "transformer_blocks.0.attn.to_q"
    down, up = lora_of(base.dit, batch=1, rank=2)[name]
    kohya = {f"{name}.lora_down.weight": down[0], f"{name}.lora_up.weight": up[0], f"{name}.alpha": torch.tensor(1.0)}
    found = lora.read(kohya, base.dit, NAMES, "mine")
    assert torch.equal(found[name][0], down) and torch.equal(found[name][1], up / 2)


@pytest.mark.parametrize("base", [Base], indirect=True)
@pytest.mark.parametrize(
    "given, message",
    [
        (3, "lora is a int, expected a dict of tensors"),
        (
            {"transformer.blocks.0.lora_A.weight": torch.zeros(2, 128)},
            "'transformer.blocks.0.lora_A.weight' belongs to no layer",
        ),
        ({"proj_out.lora_A.weight": torch.zeros(2, 64)}, "shape \\(2, 64\\), but proj_out takes 128 features"),
        ({"proj_out.lora_A.weight": torch.zeros(2, 128)}, "A \\(2, 128\\) and B None for proj_out"),
        (
            {"proj_out.lora_A.weight": torch.zeros(2, 128), "proj_out.lora_B.weight": torch.zeros(63, 2)},
            "the update of proj_out has 63 outputs and 128 inputs, but the layer has 64 and 128; this adapter",
        ),
    ],
)
def test_a_lora_of_another_network_is_refused(given, message, base):
    with pytest.raises(ValueError, match=f"mine: .*{message}"):
        lora.read(given, base.dit, NAMES, "mine")


def test_loras_of_samples_need_layers_that_see_samples(base):
    with pytest.raises(ValueError, match="3 samples have a lora each, but a Linear of .* gets inputs of 2 samples"):
        base(slice(0, 2), lora=lora_of(base.dit))


# Text -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [Base], indirect=True)
def test_further_text_follows_the_real_one_and_padding_the_further(base):
    extra = some(3, 2, base.dit.config.joint_attention_dim, seed=4)
    text, mask = append_text(base.batch["prompt_emb"], base.batch["prompt_emb_mask"], extra)
    assert mask.sum(1).tolist() == [11, 4, 7] and torch.equal(mask, mask.sort(dim=1, descending=True).values)
    for row, length in enumerate([9, 2, 5]):
        expected = torch.cat([base.batch["prompt_emb"][row, :length], extra[row]])
        assert torch.equal(text[row, : length + 2], expected)


def test_a_batch_with_further_text_is_its_samples(base):
    extra = some(3, 2, base.dit.config.joint_attention_dim, seed=4)
    together, plain = base(extra_text_embedding=extra), base()
    for row in range(3):
        alone = base(slice(row, row + 1), extra_text_embedding=extra[row : row + 1])
        assert torch.allclose(together[row : row + 1], alone, atol=1e-5)
        assert not torch.allclose(together[row], plain[row], atol=1e-4)


# Batches --------------------------------------------------------------------------------------------------------------


def test_samples_become_a_batch_entry_by_entry():
    samples = [{"kv_cache": {"block_0": (some(1, 2, 4, 8, seed=n), some(1, 2, 4, 8, seed=n + 9))}} for n in range(3)]
    ((block, pair),) = collate(samples)["kv_cache"].items()
    assert block == "block_0" and [tuple(side.shape) for side in pair] == [(3, 2, 4, 8)] * 2
    assert torch.equal(pair[1][2:], samples[2]["kv_cache"]["block_0"][1])


@pytest.mark.parametrize(
    "other, message",
    [
        (
            {"block_0": (PAIR[:, :2], PAIR[:, :2])},
            r"kv_cache\['block_0'\]\[0\]: shapes \(1, 5, 4, 32\), \(1, 2, 4, 32\)",
        ),
        ({"block_1": (PAIR, PAIR)}, r"kv_cache\['block_0'\] is in 1 of 2 samples of a batch; set micro_batch_size=1"),
    ],
)
def test_samples_that_differ_are_named_by_block(other, message):
    with pytest.raises(ValueError, match=message):
        collate([{"kv_cache": {"block_0": (PAIR, PAIR)}}, {"kv_cache": other}])


def test_tensors_of_a_plan_have_no_values_to_refuse():
    with FakeTensorMode():
        kv_cache.check_finite({"k": torch.ones(2) / 0}, "a template")
    kv_cache.check_finite({"k": torch.ones(2, device="meta")}, "a template")
