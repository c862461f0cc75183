"""Convert the colours of a picture from its ICC profile to sRGB, as a viewer shows it."""

import logging
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

logger = logging.getLogger(__name__)

ROUNDING = 2  # of 255: two conversions between profiles of sRGB differ by as much
GREY_MODES = ("1", "L", "LA", "La")
warned: set[int] = set()  # hashes of the profiles that this process has warned of


def in_srgb(image: Image.Image, name: str) -> Image.Image:
    """A picture with its colours in sRGB; the picture itself if it has no ICC profile, or that of sRGB.

    A profile that is damaged, or that is for colours of another kind than the picture's, is ignored, with a warning.

    Args:
        name: Name of the file in the warning.
    """
    profile = image.info.get("icc_profile")
    if not profile or image.mode == "LAB":
        return image
    mode = "L" if image.mode in GREY_MODES else "CMYK" if image.mode == "CMYK" else "RGB"
    try:
        transform = _transform(profile, mode)
    except ImageCms.PyCMSError as error:
        _warn(profile, name, mode, error)
        return image
    if transform is None:
        return image
    shown = transform.apply(image.convert(mode))
    if image.has_transparency_data:
        shown.putalpha(image.convert("RGBA").getchannel("A"))
    return shown


@lru_cache(maxsize=16)  # the files of one camera or program have one profile
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile to sRGB; None for sRGB itself, whose values stay as they are stored.

    Perceptual, as Chrome shows it (its library, skcms, prefers the table A2B0).
    """
    source, target = BytesIO(profile), ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(source, target, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
    return None if mode == "RGB" and _changes_nothing(transform) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    changed = np.asarray(transform.apply(Image.fromarray(colours)), dtype=int)
    return bool(abs(changed - colours).max() <= ROUNDING)


def _warn(profile: bytes, name: str, mode: str, error: Exception) -> None:
    if hash(profile) not in warned:
        warned.add(hash(profile))
        logger.warning(
            "%s: its ICC profile cannot be used for %s colours (%s); its stored values, and those of all files with "
            "this profile, are taken as sRGB. Save it as sRGB if they look wrong.",
            name,
            mode,
            error,
        )
