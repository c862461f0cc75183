"""EliGen: which token sees which, positions of texts, batches, and what is refused."""

from unittest import mock

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from diffsynth.core.data import Row, Sample
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.pipelines.networks import qwen_image as network
from diffsynth.pipelines.shared.entities import _tokens, regional_mask, with_entities

SIZE = {"height": 64, "width": 32, "seed": 0, "num_inference_steps": 2, "cfg_scale": 1}
COLUMNS = ["eligen_entity_prompts", "eligen_entity_masks"]


def half(upper: bool, size: tuple[int, int] = (32, 64)) -> Image.Image:
    """An image that is white in one half."""
    image = Image.new("RGB", size)
    image.paste("white", (0, 0 if upper else size[1] // 2, size[0], size[1] // 2 if upper else size[1]))
    return image


ENTITIES = {COLUMNS[0]: ["a red apple", "a rocket"], COLUMNS[1]: [half(True), half(False, (8, 16))]}


def test_a_text_sees_itself_and_its_part_of_the_image_which_sees_it():
    lengths, parts = (
        [2, 3, 4],
        torch.tensor([[[1, 0, 0, 0, 1], [0, 0, 0, 0, 0]], [[0, 1, 1, 0, 0], [1, 1, 0, 0, 1]]]).bool(),
    )
    kept = torch.ones(2, 9, dtype=torch.bool)
    kept[0, 1] = kept[1, 8] = False  # padding
    found = regional_mask(kept, lengths, parts)
    text_of = [0, 0, 1, 1, 1, 2, 2, 2, 2]

    def sees(sample: int, query: int, key: int) -> bool:
        covers = lambda text, token: text == 2 or bool(parts[sample, text, token - 9])  # noqa: E731
        if key < 9 and not kept[sample, key]:
            return False
        if query < 9 and key < 9:
            return text_of[query] == text_of[key]
        if query >= 9 and key >= 9:
            return True
        return covers(text_of[query], key) if query < 9 else covers(text_of[key], query)

    expected = [[[sees(b, i, j) for j in range(14)] for i in range(14)] for b in range(2)]
    assert found.tolist() == expected


def test_every_text_begins_at_the_same_position_and_its_padding_is_known():
    texts = [torch.randn(2, length, 3) for length in (2, 1, 3)]
    padded = torch.tensor([[True, True, True], [True, False, False]])
    text, kept, positions = with_entities(texts[2], padded, texts[:2], [None, None])
    assert torch.equal(text, torch.cat(texts, dim=1)) and positions.tolist() == [0, 1, 0, 0, 1, 2]
    assert kept.tolist() == [[True] * 6, [True] * 4 + [False] * 2]


def inputs(pipe) -> dict:
    generator = torch.Generator().manual_seed(0)
    shapes = {"latents": (1, 16, 8, 4), "prompt_emb": (1, 4, 128)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    entities = [torch.randn(1, length, 128, generator=generator) for length in (3, 2)]
    tokens = torch.zeros(1, 2, 8, dtype=torch.bool)
    tokens[0, 0, :4], tokens[0, 1, 4:] = True, True
    masks = {"entity_emb": entities, "entity_emb_mask": [None, None], "entity_tokens": tokens}
    return {"dit": pipe.dit, "timestep": torch.tensor([500.0]), "prompt_emb_mask": None, **drawn, **masks}


@torch.no_grad()
def test_after_one_block_an_entity_has_changed_its_part_of_the_image_only(pipe):
    pipe.dit.transformer_blocks = nn.ModuleList(pipe.dit.transformer_blocks[:1])
    given = inputs(pipe)
    other = given | {"entity_emb": [given["entity_emb"][0] + 1, given["entity_emb"][1]]}
    change = (pipe.model_fn(**given) - pipe.model_fn(**other)).abs().amax((0, 1, 3))  # by row of latents
    assert change[:4].min() > 1e-5 and change[4:].max() == 0


@torch.no_grad()
def test_without_regions_and_with_positions_in_a_row_it_is_a_longer_prompt(pipe):
    given = inputs(pipe)
    texts = torch.cat([*given.pop("entity_emb"), given["prompt_emb"]], dim=1)
    plain = {name: value for name, value in given.items() if not name.startswith("entity")} | {"prompt_emb": texts}
    row = lambda text, mask, entities, masks: (torch.cat([*entities, text], dim=1), None, torch.arange(9))  # noqa: E731
    everything = lambda *_: torch.ones(1, 17, 17, dtype=torch.bool)  # noqa: E731
    regional = inputs(pipe)
    found = pipe.model_fn(**regional)
    with (
        mock.patch.object(network, "with_entities", row),
        mock.patch.object(network, "regional_mask", everything),
    ):
        assert_close(pipe.model_fn(**regional), pipe.model_fn(**plain), atol=1e-5, rtol=1e-4)
    assert (found - pipe.model_fn(**plain)).abs().max() > 1e-3


def test_masks_are_read_at_the_size_of_tokens_and_only_the_positive_side_has_entities(pipe):
    request = {"prompt": "a", "negative_prompt": "b", **SIZE, **ENTITIES, "cfg_scale": 3.0}
    _, posi, nega = pipe.prepare([request])
    assert posi["entity_tokens"].tolist() == [[[True] * 4 + [False] * 4, [False] * 4 + [True] * 4]]
    assert [text.shape[1] for text in posi["entity_emb"]] == [8, 7] and "entity_emb" not in nega
    assert "entity_emb" in pipe.prepare([request | {"negative_eligen_entity_prompts": ["c", "d"]}])[2]


@pytest.mark.slow
def test_a_batch_of_rows_with_entities_is_its_samples(training_module):
    module = training_module(FlowMatchSFT(trainable_models=["dit"], extra_inputs=COLUMNS))
    rows = [
        {"prompt": "a red apple", COLUMNS[0]: ["a line emoji of a tiger face", "b"]},
        {"prompt": "a line emoji of a tiger face", COLUMNS[0]: ["red", "a much longer prompt of a rocket"]},
    ]
    samples = [
        Sample(Row({"image": half(n == 0), COLUMNS[1]: ENTITIES[COLUMNS[1]], **row}), epoch=0, index=n)
        for n, row in enumerate(rows)
    ]
    together = module(samples)
    assert_close(together, torch.cat([module([sample]) for sample in samples]), rtol=1e-5, atol=1e-5)
    without = FlowMatchSFT(trainable_models=["dit"])
    assert (training_module(without)(samples) - together).abs().min() > 1e-4


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {COLUMNS[0]: "a cat"},
            r"eligen_entity_prompts is 'a cat'; expected a list of prompts, such as \[a cat, a hat\]",
        ),
        ({COLUMNS[0]: ["a"]}, "has 1 prompts, but eligen_entity_masks has 2 images; give each entity one of both"),
        ({COLUMNS[1]: ["a.png", "b.png"]}, "eligen_entity_masks is or holds 'a.png', expected images"),
    ],
)
def test_entities_without_masks_are_refused(change, message, pipe):
    with pytest.raises(ValueError, match=message):
        pipe.prepare([{"prompt": "a", **SIZE, **ENTITIES, **change}])


def test_images_beside_the_sampled_one_are_refused(pipe):
    with pytest.raises(ValueError, match="are for the sampled image alone; leave edit_image and context_image out"):
        pipe.model_fn(**inputs(pipe), context_latents=[torch.zeros(1, 16, 8, 4)])


@pytest.mark.parametrize("grey, seen", [(127, False), (128, True), (255, True)])
def test_a_token_is_covered_if_any_of_its_latent_pixels_is_nearer_to_white(grey, seen, pipe):
    mask = Image.new("RGB", (4, 8))  # one pixel of a mask for each latent pixel
    mask.putpixel((1, 5), (grey,) * 3)
    assert _tokens(pipe, mask, 64, 32).tolist() == [[number == 4 and seen for number in range(8)]]
