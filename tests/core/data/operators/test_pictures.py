"""The one door for pictures: colours, formats, bounds, and that there is no other door."""

import os
import re
import sys
import types
import zlib
from io import BytesIO
from pathlib import Path
from struct import pack

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import diffsynth
from diffsynth.core.data import LoadGIF, LoadImage, UnifiedDataset
from diffsynth.core.data.operators import colours
from diffsynth.core.data.sources.picture_formats import picture_suffixes, readable_formats
from diffsynth.diffusion.pipeline.generation import load_images, open_files, read_prompts

PACKAGE = Path(diffsynth.__file__).parent


def test_no_picture_is_opened_elsewhere():
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.parent.glob("*.py")]
    opening = [
        file.name for file in files if re.search(r"\bImage\.open\(|PIL\.Image import open", file.read_text("utf-8"))
    ]
    assert sorted(opening) == ["picture_files.py", "serve.py"]  # the latter runs without the rest of the package


# Colours --------------------------------------------------------------------------------------------------------------

WHITE = (0.9642, 1.0, 0.8249)  # D50, the white of ICC profiles
# Columns are the primaries of Display P3 in XYZ, adapted to D50 (Apple's profile); then Lindbloom's D50 matrix of sRGB.
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
TO_SRGB = ((3.1338561, -1.6168667, -0.4906146), (-0.9787684, 1.9161415, 0.0334540), (0.0719453, -0.2289914, 1.4052427))
GAMMA = 2.2


def profile(space: bytes, connection: bytes = b"XYZ ", kind: bytes = b"mntr", **tags: bytes) -> bytes:
    """An ICC profile of version 2 (ICC.1:2001-04, 6.1 and 6.2)."""
    table, body = pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name.encode() + pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = bytes(8) + pack(">I", 0x02400000) + kind + space + connection + bytes(12) + b"acsp" + bytes(28)
    head += b"".join(pack(">i", round(value * 65536)) for value in WHITE)
    whole = head.ljust(128, b"\0") + table + body
    return pack(">I", len(whole)) + whole[4:]


def xyz(values) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(pack(">i", round(value * 65536)) for value in values)


def curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + pack(">IH", 1, round(gamma * 256))


def wide_gamut() -> bytes:
    primaries = dict(zip(("rXYZ", "gXYZ", "bXYZ"), map(xyz, P3), strict=True))
    return profile(b"RGB ", wtpt=xyz(WHITE), **primaries, **dict.fromkeys(("rTRC", "gTRC", "bTRC"), curve(GAMMA)))


def ink() -> bytes:
    """A profile of CMYK whose inks are grey: each of them halves the lightness, and black takes it."""
    lightness = [255 >> (cyan + magenta + yellow) for cyan in (0, 1) for magenta in (0, 1) for yellow in (0, 1)]
    grid = [level for cmy in lightness for level in (cmy, 0)]
    identity = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + b"".join(pack(">i", 65536 * (n in (0, 4, 8))) for n in range(9))
    table += identity * 4 + b"".join(bytes([level, 128, 128]) for level in grid) + identity * 3
    return profile(b"CMYK", b"Lab ", b"prtr", wtpt=xyz(WHITE), A2B0=table)


def encoded(linear: np.ndarray) -> tuple[int, ...]:
    """sRGB's curve (IEC 61966-2-1) of linear values, from 0 to 255."""
    linear = np.clip(linear, 0, 1)
    return tuple(np.round(255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)))


STORED = (200, 80, 80)
SHOWN = encoded(np.array(TO_SRGB) @ np.array(P3).T @ (np.array(STORED) / 255) ** GAMMA)


def close(color, expected) -> bool:
    return max(abs(a - b) for a, b in zip(color, expected, strict=True)) <= 3


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "tif"])
def test_a_profile_is_applied_in_every_format(tmp_path, extension):
    options = {"quality": 95} if extension == "jpg" else {"lossless": True} if extension == "webp" else {}
    path = tmp_path / f"a.{extension}"
    Image.new("RGB", (16, 16), STORED).save(path, icc_profile=wide_gamut(), **options)
    assert close(LoadImage()(str(path)).getpixel((8, 8)), SHOWN)


@pytest.mark.parametrize(
    ("image", "shown"),
    [
        (Image.new("RGBA", (16, 16), (*STORED, 255)), SHOWN),
        (Image.new("RGBA", (16, 16), (*STORED, 51)), [255 - (255 - value) / 5 for value in SHOWN]),
        (Image.new("RGB", (16, 16), STORED).quantize(), SHOWN),
    ],
    ids=["opaque", "clear", "palette"],
)
def test_a_profile_is_for_colours_not_for_transparency(tmp_path, image, shown):
    path = str(tmp_path / "a.png")
    image.save(path, icc_profile=wide_gamut())
    assert close(LoadImage()(path).getpixel((8, 8)), shown)
    assert LoadGIF(num_frames=1)(path) == [LoadImage()(path)]


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_a_profile_of_grey_is_applied(tmp_path, mode):
    linear = profile(b"GRAY", wtpt=xyz(WHITE), kTRC=curve(1.0))
    Image.new(mode, (16, 16), 128 if mode == "L" else (128, 255)).save(tmp_path / "a.png", icc_profile=linear)
    assert close(LoadImage()(str(tmp_path / "a.png")).getpixel((8, 8)), encoded(np.full(3, 128 / 255)))


def test_a_profile_of_inks_is_applied(tmp_path):
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.tif", icc_profile=ink())
    half = ((127 / 255 * 100 + 16) / 116) ** 3  # CIE 1976: luminance of a lightness
    assert close(LoadImage()(str(tmp_path / "a.tif")).getpixel((8, 8)), encoded(np.full(3, half)))


def test_a_profile_of_srgb_changes_no_value(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    srgb = colours.ImageCms.ImageCmsProfile(colours.ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=srgb)
    assert (np.asarray(LoadImage()(str(tmp_path / "a.png"))) == pixels).all()


@pytest.mark.parametrize(
    ("mode", "content"), [("RGB", b"no profile"), ("RGB", wide_gamut()[:300]), ("L", wide_gamut()), ("RGB", ink())]
)
def test_a_profile_that_cannot_be_used_is_ignored_with_one_warning(tmp_path, mode, content, caplog, monkeypatch):
    monkeypatch.setattr(colours, "warned", set())
    for name in ("a.png", "b.png"):
        Image.new(mode, (16, 16), 200 if mode == "L" else STORED).save(tmp_path / name, icc_profile=content)
        assert LoadImage()(str(tmp_path / name)).getpixel((8, 8)) == ((200,) * 3 if mode == "L" else STORED)
    (record,) = caplog.records
    assert f"{tmp_path / 'a.png'}: its ICC profile cannot be used" in record.message


def test_a_cache_knows_a_picture_with_a_profile_as_another(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", icc_profile=wide_gamut())
    Image.new("RGB", (16, 16)).save(tmp_path / "b.png")
    for load in (LoadImage(), LoadGIF(num_frames=1)):
        with_profile, without = (load.unread(str(tmp_path / name)).describe() for name in ("a.png", "b.png"))
        assert with_profile[1:] == [*without[1:], "sRGB"]


# Formats and bounds ---------------------------------------------------------------------------------------------------


def test_a_plug_in_that_is_installed_is_used(tmp_path, monkeypatch):
    """A package of the name of pillow-heif that reads PNG as HEIC."""

    def register_heif_opener():
        Image.register_open("HEIF", lambda file, name: PngImagePlugin.PngImageFile(BytesIO(file.read()[12:])), heic)
        Image.register_extension("HEIF", ".heic")

    def heic(start):
        return start[4:12] == b"ftypheic"

    module = types.SimpleNamespace(register_heif_opener=register_heif_opener)
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    for name, copied in {"OPEN": dict(Image.OPEN), "EXTENSION": dict(Image.EXTENSION), "ID": list(Image.ID)}.items():
        monkeypatch.setattr(Image, name, copied)
    png = BytesIO()
    Image.new("RGB", (16, 16), "red").save(png, "png")
    (tmp_path / "a.heic").write_bytes(bytes(4) + b"ftypheic" + png.getvalue())
    readable_formats.cache_clear()
    assert LoadImage()(str(tmp_path / "a.heic")).getpixel((0, 0)) == (255, 0, 0)
    readable_formats.cache_clear()


def test_no_format_starts_a_program():
    assert not {"EPS", "WMF"} & set(readable_formats())
    assert {".jfif", ".jp2", ".heic", ".jxl", ".avif", ".eps", ".mpo"} <= set(picture_suffixes())
    assert not {".h5", ".mpg", ".pdf", ".txt", ".json"} & set(picture_suffixes())


def with_text(path, size: int, before: bool):
    """A PNG with a compressed text of so many bytes, before its pixels or after them."""
    png = BytesIO()
    Image.new("RGB", (16, 16), "red").save(png, "png")
    text = b"workflow\0\0" + zlib.compress(bytes(size))
    chunk = pack(">I", len(text)) + b"zTXt" + text + pack(">I", zlib.crc32(b"zTXt" + text))
    head, tail = png.getvalue()[:33], png.getvalue()[33:]  # 33 bytes: the signature and IHDR
    path.write_bytes(head + chunk + tail if before else head + tail[:-12] + chunk + tail[-12:])
    return str(path)


@pytest.mark.parametrize("before", [True, False])
def test_a_workflow_in_a_picture_is_no_bomb(tmp_path, before):
    path = with_text(tmp_path / "a.png", 2 << 20, before)
    assert LoadImage().check(path) == (16, 16) and LoadImage()(path).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ValueError, match="holds a text of more than 16 MiB; save it without its metadata"):
        LoadImage()(with_text(tmp_path / "b.png", 17 << 20, before))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
def test_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    path = str(tmp_path / "a.png")
    os.mkfifo(path)
    monkeypatch.setattr("builtins.open", pytest.fail)  # whoever opens a pipe waits for someone who writes to it
    for use in (LoadImage(), LoadImage().check, LoadGIF().check):
        with pytest.raises(ValueError, match="a.png is a pipe or a device; expected a file"):
            use(path)


def test_the_size_of_an_animation_is_that_of_its_upright_frames(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "a.webp", exif=exif)
    load = LoadGIF(num_frames=1)
    assert load.check(str(tmp_path / "a.webp")) == [load(str(tmp_path / "a.webp"))[0].size] == [(10, 20)]


# Sampling -------------------------------------------------------------------------------------------------------------


def upright(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10), STORED).save(path, exif=exif, icc_profile=wide_gamut(), quality=95)


@pytest.mark.parametrize("load", [load_images, lambda **paths: open_files({"scale": 0.5, **paths})])
def test_a_picture_to_start_from_is_what_training_sees(tmp_path, load):
    upright(tmp_path / "a.jpg")
    image = load(image=str(tmp_path / "a.jpg"))["image"]
    assert image == LoadImage()(str(tmp_path / "a.jpg")) and image.size == (10, 20)
    Image.fromarray(np.full((16, 16), 300, dtype=np.uint16)).save(tmp_path / "b.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "c.eps")
    for name, reason in {"b.png": "more than 8 bits a channel", "c.eps": "is PostScript, which is a program"}.items():
        with pytest.raises(ValueError, match=re.escape(f"image={tmp_path / name}: ") + f".*{reason}"):
            load(image=str(tmp_path / name))


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0)])
def test_a_mask_on_a_transparent_layer_is_refused(tmp_path, colour):
    """On white, as a viewer shows it, a white area would vanish, and a black one would invert the mask."""
    layer = Image.new("RGBA", (32, 32), (*colour, 0))
    layer.paste((*colour, 255), (0, 0, 16, 32))
    layer.save(tmp_path / "mask.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("image,prompt,loss_mask\na.png,a,mask.png\n")
    dataset = UnifiedDataset.from_folder(str(tmp_path), data_file_keys=["image", "loss_mask"])
    dataset.read_images_in("RGB")
    refused = "has transparent pixels, but a mask is read by its white and black; save it without transparency"
    with pytest.raises(ValueError, match=f"row 1: loss_mask 'mask.png': {refused}"):
        dataset[0]
    with pytest.raises(ValueError, match=re.escape(f"inpaint_mask={tmp_path / 'mask.png'}: {refused}")):
        load_images(inpaint_mask=str(tmp_path / "mask.png"))
    layer.convert("RGB").convert("RGBA").save(tmp_path / "mask.png")  # with a channel for alpha, but opaque
    assert dataset[0]["loss_mask"] == load_images(inpaint_mask=str(tmp_path / "mask.png"))["inpaint_mask"]


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffa bear\r\na fox\n", encoding="utf-8", newline="")
    assert read_prompts(str(tmp_path / "a.txt")) == ["a bear", "a fox"]
    (tmp_path / "a.txt").write_bytes("ein Bär".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8 \(.* at byte 5\); save it as UTF-8\.$"):
        read_prompts(str(tmp_path / "a.txt"))
