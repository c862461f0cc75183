"""Qwen-Image-2.1's transformer, called with the numbers of tokens: segments of text and of images, and positions.

Shapes: B batch, C channels, L text tokens, S tokens of text and images, D width, h w latent size.
"""

from collections.abc import Sequence
from functools import partial

import torch
from diffusers import QwenImage21Transformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from ...core.host_memory import sent
from ...diffusion.pipeline.attention import rotated, rotation_table

Segment = tuple[int, int, Tensor | None]  # first token, token after the last, and which tokens until there they see


class QwenImage21AttnProcessor:
    """Attention of each segment to the tokens until its end, as diffusers' processor computes it except `rotated`."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, rotary_emb: Tensor, segments: Sequence[Segment], **_
    ) -> Tensor:
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = rotated(attn.norm_q(query).to(value.dtype), rotary_emb)
        key = rotated(attn.norm_k(key).to(value.dtype), rotary_emb)
        attend = partial(dispatch_attention_fn, backend=self._attention_backend)
        seen = [
            attend(query[:, start:end], key[:, :end], value[:, :end], attn_mask=mask) for start, end, mask in segments
        ]
        tokens = torch.cat(seen, dim=1).flatten(2).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](tokens))


class QwenImage21Transformer(QwenImage21Transformer2DModel):
    """The released transformer, called with the numbers of tokens as ints.

    diffusers' `forward` reads them back from the device, and gives the image of a short prompt the position that it has
    after the longest prompt of its batch.
    """

    def use_segments(self) -> None:
        if not self.config.causal_condition:
            raise ValueError(
                "dit has causal_condition=false in its config.json, expected true; take the config.json that was "
                "released with Qwen-Image-2.1."
            )
        for block in self.transformer_blocks:
            block.attn.set_processor(QwenImage21AttnProcessor())

    def forward(
        self, images: Sequence[Tensor], text: Tensor, lengths: Sequence[Sequence[int]], timestep: Tensor
    ) -> Tensor:
        """Velocity (B, C, h, w) of the last image at timesteps (B,) in [0, 1].

        Args:
            images: Latents (B, C, h, w) of each image, the clean ones first and the noisy one last.
            text: Text embeddings (B, L, D), right-padded.
            lengths: For each sample the numbers of tokens of its text before each image.
        """
        *heads, _ = lengths[0]
        runs = [*heads, text.shape[1] - sum(heads)]
        lasts = [own[-1] for own in lengths]
        ends = sent(torch.tensor(lasts), text.device) if min(lasts) < max(lasts) else None
        parts = zip(self.txt_in(text).split(runs, dim=1), map(self._tokens, images), strict=True)
        tokens = torch.cat([tensor for pair in parts for tensor in pair], dim=1)
        count = images[-1].shape[2:].numel()
        temb, modulation, is_target = self._modulation(timestep, tokens, count)
        table = rotation_table(self._rotation(runs, ends, images))
        layout = (table, None, is_target, None, None, None, segments(runs, ends, images))  # without a cache of keys
        checkpoints = torch.is_grad_enabled() and self.gradient_checkpointing
        for block in self.transformer_blocks:
            run = partial(self._gradient_checkpointing_func, block) if checkpoints else block
            tokens = run(tokens, modulation, *layout)
        velocity = self.proj_out(self.norm_out(tokens[:, -count:], temb[: len(text)]))
        return velocity.transpose(1, 2).unflatten(2, images[-1].shape[2:])

    def _tokens(self, image: Tensor) -> Tensor:
        return self.img_in(image.flatten(2).transpose(1, 2))

    def _modulation(self, timestep: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (B + 1, D) of the timesteps and of 0, their modulation, and the tokens (S,) at the timesteps."""
        temb = self.time_text_embed(torch.cat([timestep, timestep.new_zeros(1)]), tokens)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return temb, self.modulation(temb), places >= tokens.shape[1] - count

    def _rotation(self, runs: Sequence[int], ends: Tensor | None, images: Sequence[Tensor]) -> Tensor:
        """Complex rotations (S, head_dim / 2), or (B, S, head_dim / 2) where the positions of the samples differ.

        Text positions grow by 1 on all three axes. An image has one position on the first axis; rows and columns are
        centred on 0. The next text token comes max(h, w) later.
        """
        rope = self.pos_embed
        rope.freqs = [table.to(images[-1].device) for table in rope.freqs]
        place, parts = 0, []
        for run, image in zip(runs, images, strict=True):
            parts.append(torch.cat([table[place : place + run] for table in rope.freqs], dim=-1))
            place += run
            after = place if ends is None or image is not images[-1] else place - run + ends
            parts.append(_grid(rope.freqs, after, *image.shape[2:]))
            place += max(image.shape[2:])
        size = torch.broadcast_shapes(*(part.shape[:-2] for part in parts))
        return torch.cat([part.expand(*size, *part.shape[-2:]) for part in parts], dim=-2)


def _grid(tables: Sequence[Tensor], place: int | Tensor, height: int, width: int) -> Tensor:
    """Rotations (height · width, head_dim / 2) of an image at a place, or (B, …) at places (B,)."""
    frame = tables[0][place].unsqueeze(-2).unsqueeze(-2)
    rows, columns = (
        table[torch.arange(-(side - side // 2), side // 2, device=table.device)]
        for table, side in zip(tables[1:], (height, width), strict=True)
    )
    size = (*frame.shape[:-3], height, width)
    axes = (frame, rows.unsqueeze(1), columns)
    return torch.cat([axis.expand(*size, axis.shape[-1]) for axis in axes], dim=-1).flatten(-3, -2)


def segments(runs: Sequence[int], ends: Tensor | None, images: Sequence[Tensor]) -> list[Segment]:
    """The runs of text, whose tokens see those before them, and the images; only the last one could see padding.

    Args:
        ends: Numbers of tokens (B,) of the last run without padding; None if none is padded.
    """
    device, found, place = images[-1].device, [], 0
    for run, image in zip(runs, images, strict=True):
        causal = torch.ones(run, place + run, dtype=torch.bool, device=device).tril(place)
        found.append((place, place + run, causal))
        place += run
        found.append((place, place + image.shape[2:].numel(), None))
        place += image.shape[2:].numel()
    start, end, _ = found[-1]
    if ends is not None:
        places = torch.arange(end, device=device)
        is_seen = (places < start - runs[-1] + ends.unsqueeze(1)) | (places >= start)
        found[-1] = (start, end, is_seen[:, None, None])
    return [segment for segment in found if segment[0] < segment[1]]
