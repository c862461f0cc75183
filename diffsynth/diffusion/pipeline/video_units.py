"""Units that families of video models share; the sizes that they need come from the pipeline's `latents`.

Shapes: C channels, T latent frames, h w latent size.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ...core.data.operators.masks import of_other_sizes
from .image_units import image_list, latent_weights, tiling
from .units import PipelineUnit, in_groups

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline


class VideoShapeChecker(PipelineUnit):
    """Rounds height, width and the number of frames up to what the latents need."""

    def __init__(self):
        super().__init__(output_params=("height", "width", "num_frames"))

    def process(self, pipe, height, width, num_frames):
        return pipe.latents.size_of({"height": height, "width": width, "num_frames": num_frames})


class VideoNoiseInitializer(PipelineUnit):
    """Makes the initial noise (1, C, k + T, h, w) from the seed; k is the number of reference images, usually 0."""

    def __init__(self):
        super().__init__(output_params=("noise",))

    def process(self, pipe, height, width, num_frames, seed, rand_device, reference_latents=None):
        count = 0 if reference_latents is None else reference_latents.shape[2]
        shape = pipe.latents.shape(height, width, num_frames + count * pipe.latents.time_factor)
        # Drawn in fp32 whatever the pipeline's dtype is, and that of references last, as DiffSynth-Studio does.
        return {"noise": pipe.generate_noise(shape, seed, rand_device, torch.float32).roll(count, dims=2)}


class InputVideoEmbedder(PipelineUnit):
    """Encodes `input_video` to `input_latents`; `latents` is where sampling starts: noise, or the noised video."""

    def __init__(self):
        super().__init__(output_params=("latents", "input_latents"), onload_model_names=("vae",))

    def process(self, pipe, input_video, noise, tiled, tile_size, tile_stride, reference_latents=None):
        if input_video is None:
            return {"latents": noise, "input_latents": None}
        (video_latents,) = encode_videos(pipe, [input_video], tiled, tile_size, tile_stride)
        input_latents = behind(reference_latents, video_latents)
        if pipe.scheduler.training:
            return {"latents": noise, "input_latents": input_latents}
        latents = pipe.scheduler.add_noise(input_latents, noise, pipe.scheduler.timesteps[0])
        return {"latents": latents, "input_latents": input_latents}

    def process_batch(self, pipe, batch):
        """Encode videos of training data; those of equal size go through the autoencoder together."""
        latents = encode_videos(pipe, [inputs["input_video"] for inputs in batch], *tiling(batch[0]))
        whole = [behind(inputs.get("reference_latents"), own) for inputs, own in zip(batch, latents, strict=True)]
        return [{"latents": i["noise"], "input_latents": own} for i, own in zip(batch, whole, strict=True)]


def behind(references: Tensor | None, latents: Tensor) -> Tensor:
    """Latents (1, C, k + T, h, w): those of k reference images, if there are any, and those of T frames behind them."""
    return latents if references is None else torch.cat([references, latents], dim=2)


class FirstFrameEmbedder(PipelineUnit):
    """Encodes `input_image`, the first frame, to `given_latents` (1, C, 1, h, w).

    The autoencoder is causal: these are the first latent frame of a video that begins with this image.
    """

    column = "input_image"

    def __init__(self):
        super().__init__(output_params=("given_latents",), onload_model_names=("vae",))

    def process(self, pipe, input_image, height, width, tiled, tile_size, tile_stride):
        if input_image is None:
            return {}
        frame = as_frame(pipe, input_image, "input_image", height, width)
        return {"given_latents": encode_videos(pipe, [[frame]], tiled, tile_size, tile_stride)[0]}

    def process_batch(self, pipe, batch):
        """Encode first frames of training data; those of equal size go through the autoencoder together."""
        images = [(inputs["input_image"], "input_image", inputs["height"], inputs["width"]) for inputs in batch]
        latents = encode_videos(pipe, [[as_frame(pipe, *image)] for image in images], *tiling(batch[0]))
        return [{"given_latents": own} for own in latents]


class VideoLossMask(PipelineUnit):
    """Turns a mask of training data, whose white is trained, into weights (1, 1, k + T, h, w) of the loss.

    The mask is a clip as long as the video, or one image for all frames. A latent frame has the mean weight of its
    frames: the first of one, each other of four. The k reference images count in full.
    """

    def __init__(self):
        super().__init__(output_params=("loss_mask",))

    def process(self, pipe, height, width, num_frames, loss_mask=None, reference_latents=None):
        if loss_mask is None:
            return {}
        frames = list(loss_mask) if isinstance(loss_mask, list | tuple) else [loss_mask] * num_frames
        if len(frames) != num_frames:
            raise ValueError(
                f"loss_mask has {len(frames)} frames, but its video {num_frames}; give a clip as long, or one image."
            )
        for frame in frames:
            if frame.size != (width, height):
                raise ValueError(of_other_sizes("loss_mask", frame.size, "its video", (width, height)) + ".")
        masks = torch.stack([latent_weights(pipe, frame, height, width)[0] for frame in frames], dim=1)
        first, later = masks[:, :1], masks[:, 1:].unflatten(1, (-1, pipe.latents.time_factor)).mean(2)
        weights = torch.cat([first, later], dim=1).unsqueeze(0)
        if not weights.any():
            raise ValueError(
                "loss_mask is black all over, and has no white area to train inside of; make that area white, or leave "
                "the row out. (The video's crop may also have cut the white area off.)"
            )
        whole = None if reference_latents is None else torch.ones_like(reference_latents[:, :1]).to(weights)
        return {"loss_mask": behind(whole, weights)}


def as_frame(pipe: "BasePipeline", value: Any, name: str, height: int, width: int) -> Image.Image:
    """One image as a frame of `height` and `width` in pixels; `name` is that of the argument, for errors.

    Raises:
        ValueError: It is no image, or several.
    """
    images = image_list(value, name, pipe.media.mode)
    if len(images) != 1:
        raise ValueError(f"{name} holds {len(images)} images, expected one.")
    return images[0].resize((width, height))


def encode_videos(
    pipe: "BasePipeline", videos: Sequence[Sequence[Image.Image]], tiled: bool, tile_size: int, tile_stride: int
) -> Sequence[Tensor]:
    """Normalised latents (1, C, T, h, w) of each video; videos of equal size go through the autoencoder together."""
    pipe.load_models_to_device(["vae"])

    def encode(group: Sequence[Sequence[Image.Image]]) -> Sequence[Tensor]:
        pixels = torch.cat([pipe.media.preprocess(video, pipe.device, pipe.torch_dtype) for video in group])
        return pipe.vae.encode(pixels, tiled, tile_size, tile_stride).split(1)

    return in_groups(videos, [pipe.media.size(video) for video in videos], encode)
