import json
import os
import zlib
from pathlib import Path
from struct import pack

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from diffsynth.core.data import (
    ImageCropAndResize,
    LoadImage,
    RouteByExtensionName,
    RouteByType,
    SequentialProcess,
    ToAbsolutePath,
    ToFloat,
    ToInt,
    ToList,
    ToStr,
    UnifiedDataset,
)

# --- Composition -----------------------------------------------------------------------------------------------------


def test_operators_compose_from_left_to_right():
    assert (ToInt() >> ToStr() >> ToList())("3") == ["3"]
    assert ToFloat()("0.5") == 0.5
    assert ToStr(none_value="nothing")(None) == "nothing"


def test_each_element_of_a_list_is_processed_and_a_bad_one_named():
    assert SequentialProcess(ToInt())(["1", "2"]) == [1, 2]
    for process in (SequentialProcess(ToInt()), SequentialProcess(ToInt()).check):
        with pytest.raises(ValueError, match="^'x': invalid literal"):
            process(["1", "x"])


def test_route_is_the_first_type_that_fits():
    route = RouteByType([(str, ToInt()), (None, ToStr())])
    assert (route("1"), route(2)) == (1, "2")
    with pytest.raises(ValueError, match="is of type float, expected str or list"):
        RouteByType([(str, ToInt()), (list, ToStr())])(1.0)


@pytest.mark.parametrize(
    ("name", "extension"),
    [
        ("a.b.PNG", "png"),
        ("a#1.png", "png"),
        ("https://example.org/a.png?size=a.mp4", "png"),
        ("a", ""),
        ("folder.png/a", ""),
    ],
)
def test_route_is_the_first_extension_that_fits(name, extension):
    route = RouteByExtensionName([(("jpg", "png"), str.lower), (None, str.upper)])
    assert route(name) == (name.lower() if extension == "png" else name.upper())
    with pytest.raises(ValueError, match=f"has the extension '{extension}', expected one of gif, mp4"):
        RouteByExtensionName([(("gif", "mp4"), str.lower)]).check(name)


# --- Paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret.png", "sub/../../secret.png", ".."])
def test_path_that_leaves_the_folder_is_refused(path):
    with pytest.raises(ValueError, match="leads out of data/x"):
        ToAbsolutePath("data/x")(path)


@pytest.mark.parametrize(
    ("path", "absolute"),
    [
        ("a.png", "data/x/a.png"),
        ("sub/../a.png", "data/x/a.png"),
        ("..a.png", "data/x/..a.png"),
        (os.path.abspath("data/x/sub/a.png"), "data/x/sub/a.png"),
        ("https://example.org/../a.png", "https://example.org/../a.png"),
    ],
)
def test_path_is_relative_to_the_folder(path, absolute):
    assert ToAbsolutePath("data/x", allow_urls=True)(path) == absolute


def test_an_absolute_path_may_pass_through_a_link_to_the_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    in_link = ToAbsolutePath(str(tmp_path / "link"))
    assert {in_link(str(tmp_path / name / "a.png")) for name in ("link", "real")} == {str(tmp_path / "link" / "a.png")}
    with pytest.raises(ValueError, match="leads out of"):
        in_link(str(tmp_path / "linked" / "a.png"))


@pytest.mark.skipif(os.sep != "/", reason="on Windows such a path is found")
def test_a_path_of_windows_is_answered(tmp_path):
    with pytest.raises(ValueError, match=r"not found \(looked in .*\); write it relative to .*, with / instead of"):
        LoadImage().check(str(tmp_path / r"sub\a.png"))


# --- Sizes -----------------------------------------------------------------------------------------------------------

SIDES = st.integers(1, 400)


@given(width=SIDES, height=SIDES, max_pixels=st.integers(2000, 40_000), factor=st.sampled_from([8, 16, 32]))
def test_dynamic_size_is_a_multiple_of_the_factor_and_never_larger(width, height, max_pixels, factor):
    crop = ImageCropAndResize(None, None, max_pixels, factor, 2 * factor)
    shrink = max(1, (width * height / max_pixels) ** 0.5)
    assume(width / shrink >= 2 * factor + 1 and height / shrink >= factor + 1)
    target = crop(Image.new("L", (width, height))).size
    assert target[0] % (2 * factor) == 0 and target[1] % factor == 0
    assert 0 < target[0] <= width and 0 < target[1] <= height
    assert target[0] * target[1] <= max_pixels
    assert width / shrink - target[0] < 2 * factor + 1 and height / shrink - target[1] < factor + 1


@pytest.mark.parametrize(("size", "target"), [((1920, 1080), (1360, 768)), ((1000, 1000), (992, 992))])
def test_dynamic_size_is_upstreams(size, target):
    assert ImageCropAndResize().target_size(*size) == target


@given(width=st.integers(20, 200), height=st.integers(20, 200))
def test_fixed_size_keeps_the_centre(width, height):
    """A dot in the middle stays in the middle, and no side shows anything but the image."""
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[height // 2 - 3 : height - height // 2 + 3, width // 2 - 3 : width - width // 2 + 3] = 255
    cropped = np.asarray(ImageCropAndResize(height=96, width=128)(Image.fromarray(pixels))) / 255.0
    assert cropped.shape == (96, 128)
    rows, columns = np.indices(cropped.shape)
    scale = max(128 / width, 96 / height)
    assert abs((rows * cropped).sum() / cropped.sum() - 47.5) < 0.5 + scale / 10
    assert abs((columns * cropped).sum() / cropped.sum() - 63.5) < 0.5 + scale / 10
    white = np.asarray(ImageCropAndResize(height=96, width=128)(Image.new("L", (width, height), 255)))
    assert white.min() == 255


@pytest.mark.parametrize("size", [(150, 200), (333, 100), (96, 500), (500, 97)])
def test_fixed_size_is_upstreams_resize_and_crop(size):
    """To one step of 255, by the rounding of the coefficients."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    scale = max(128 / size[0], 96 / size[1])
    resized = Image.fromarray(pixels).resize([round(side * scale) for side in size], Image.Resampling.BILINEAR)
    left, top = round((resized.width - 128) / 2), round((resized.height - 96) / 2)
    expected = np.asarray(resized.crop((left, top, left + 128, top + 96)), dtype=int)
    cropped = np.asarray(ImageCropAndResize(height=96, width=128)(Image.fromarray(pixels)), dtype=int)
    assert abs(cropped - expected).max() <= 1


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
def test_a_strip_is_resized_where_it_is_kept(size, monkeypatch):
    """As a whole, scaled to cover 512x512, it would have 1.3 billion pixels."""
    resized, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, to, *a, **k: resized.append(to) or resize(image, to, *a, **k)
    )
    assert ImageCropAndResize(height=512, width=512)(Image.new("RGB", size)).size == (512, 512)
    assert resized == [(512, 512)]


def test_image_smaller_than_one_patch_is_refused():
    with pytest.raises(ValueError, match=r"image 10x8 is smaller than one patch \(16x16\)"):
        ImageCropAndResize()(Image.new("RGB", (10, 8)))
    with pytest.raises(ValueError, match="image 100000x20 is smaller than one patch"):
        ImageCropAndResize().target_size(100_000, 20)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"height": 512}, "height=512 and width=None: set both"),
        ({"width": 512}, "height=None and width=512: set both"),
        ({"height": 500, "width": 512}, "height_division_factor=16: set dataset.height to 512 or 496"),
        ({"height": 512, "width": 8}, "width=8 is not a multiple of width_division_factor=16: set dataset.width to 16"),
        ({"height": 64, "width": -5}, "set dataset.width to 16"),
    ],
)
def test_impossible_target_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        ImageCropAndResize(**sizes)


# --- Odd images ------------------------------------------------------------------------------------------------------

CLEAR_RED = (255, 0, 0, 0)


def uniform(mode, color):
    return Image.new(mode, (32, 32), color)


def chunk(kind: bytes, content: bytes) -> bytes:
    return pack(">I", len(content)) + kind + content + pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, color: int, row: bytes) -> bytes:
    """A PNG of equal rows, written without ever holding its pixels."""
    header = pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    deflate = zlib.compressobj(1)
    body = b"".join(deflate.compress(b"\0" + row) for _ in range(height)) + deflate.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def animation(path):
    uniform("RGB", "red").save(path, save_all=True, append_images=[uniform("RGB", "blue")])


SHOWN = {
    "CMYK": ("a.jpg", lambda path: uniform("CMYK", (0, 255, 255, 0)).save(path), (255, 0, 0)),
    "grey": ("a.png", lambda path: uniform("L", 7).save(path), (7, 7, 7)),
    "one bit": ("a.png", lambda path: uniform("1", 1).save(path), (255, 255, 255)),
    "16 bits a colour": (
        "a.png",
        lambda path: path.write_bytes(png(32, 32, 16, 2, pack(">HHH", 0x75AA, 0xFFFF, 0) * 32)),
        (0x75, 255, 0),
    ),
    "palette": ("a.png", lambda path: uniform("RGB", "red").quantize().save(path), (255, 0, 0)),
    "palette with alpha": ("a.png", lambda path: uniform("RGBA", CLEAR_RED).quantize().save(path), (255, 255, 255)),
    "transparent colour": (
        "a.png",
        lambda path: uniform("RGB", "red").save(path, transparency=(255, 0, 0)),
        (255, 255, 255),
    ),
    "grey with alpha": ("a.png", lambda path: uniform("LA", (7, 0)).save(path), (255, 255, 255)),
    "alpha": ("a.webp", lambda path: uniform("RGBA", (255, 0, 0, 0)).save(path, exact=True), (255, 255, 255)),
    "half alpha": ("a.png", lambda path: uniform("RGBA", (255, 0, 0, 51)).save(path), (255, 204, 204)),
    "full alpha": ("a.png", lambda path: uniform("RGBA", "red").save(path), (255, 0, 0)),
    "animation": ("a.gif", animation, (255, 0, 0)),
    "wrong extension": ("a.jpg", lambda path: uniform("RGB", "red").save(path, format="PNG"), (255, 0, 0)),
}


@pytest.mark.parametrize(("name", "write", "color"), SHOWN.values(), ids=SHOWN)
@pytest.mark.filterwarnings("error")
def test_odd_image_is_what_a_viewer_shows(tmp_path, name, write, color):
    write(tmp_path / name)
    path = str(tmp_path / name)
    assert LoadImage().check(path) == (32, 32)
    image = LoadImage()(path)
    assert (image.mode, image.getpixel((16, 16))) == ("RGB", color)


def test_image_is_loaded_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    image = LoadImage(mode="RGBA")(str(tmp_path / "a.jpg"))
    assert (image.size, image.mode) == ((10, 20), "RGBA")


REFUSED = {
    "absent": (lambda path: None, "not found (looked in {folder} for a.png)"),
    "empty": (Path.touch, "is not an image that Pillow can read; it is empty"),
    "text": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"),
        "is not an image that Pillow can read; it begins with b'version https://git-'",
    ),
    "folder": (Path.mkdir, "{folder}/a.png is a folder; expected a file"),
    "strip": (lambda path: Image.new("RGB", (1, 5000)).save(path), "image 1x5000 is smaller than one patch (16x16)"),
    "16 bits of grey": (
        lambda path: Image.fromarray(np.full((32, 32), 300, dtype=np.uint16)).save(path),
        "has mode I;16, more than 8 bits a channel; save it with 8 bits",
    ),
    "PostScript": (lambda path: uniform("RGB", "red").save(path, format="EPS"), "is PostScript, which is a program"),
    "bomb": (
        lambda path: path.write_bytes(png(20_000, 10_000, 1, 0, bytes(2500))),
        "Image size (200000000 pixels) exceeds limit of 178956970 pixels, could be decompression bomb DOS attack. Save",
    ),
}


@pytest.mark.parametrize(("write", "reason"), REFUSED.values(), ids=REFUSED)
def test_unusable_image_is_refused_before_it_is_decoded(tmp_path, write, reason, monkeypatch):
    write(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"image": "a.png", "prompt": "p"}\n')
    dataset, reason = UnifiedDataset(str(tmp_path)), f"row 1: image 'a.png': {reason.format(folder=tmp_path)}"
    with pytest.raises(ValueError) as error, monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.ImageFile.load", pytest.fail)
        dataset.scan()
    assert reason in str(error.value)
    with pytest.raises(ValueError) as error:
        dataset[0]
    assert reason in str(error.value)


@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "bmp", "tif"])
def test_truncated_image_is_refused_when_it_is_decoded(tmp_path, extension):
    name = f"a.{extension}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:2000])
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"image": name, "prompt": "p"}))
    dataset = UnifiedDataset(tmp_path)
    assert dataset.scan() == []
    with pytest.raises(ValueError, match=f"row 1: image '{name}': image file is truncated"):
        dataset[0]


def test_rows_may_repeat_images_and_prompts_among_blank_lines(tmp_path):
    uniform("RGB", "red").save(tmp_path / "a.png")
    row = '{"image": "a.png", "prompt": "p"}\n'
    (tmp_path / "metadata.jsonl").write_text(f"\n{row}{row}   \n\r\n{row}\n\n")
    dataset = UnifiedDataset(tmp_path)
    assert dataset.scan() == [] and len(dataset) == 3
    (tmp_path / "metadata.jsonl").rename(tmp_path / "other.jsonl")
    (tmp_path / "metadata.csv").write_text("image,prompt\n\na.png,p\n\n\na.png,p\n\n")
    dataset = UnifiedDataset(tmp_path)
    assert dataset.scan() == [] and len(dataset) == 2


# --- Layers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def layers(tmp_path):
    """A picture and its two layers, by an operator of their column: one image is RGB, each of a list RGBA."""
    for name, color in {"whole": "red", "clear": CLEAR_RED, "blue": "blue"}.items():
        uniform("RGBA", color).save(tmp_path / f"{name}.png")
    path, crop = ToAbsolutePath(str(tmp_path)), ImageCropAndResize(height=16, width=16)
    each = path >> LoadImage("RGBA") >> crop
    operator = RouteByType([(str, path >> LoadImage() >> crop), (list, SequentialProcess(each))])

    def dataset(*images):
        rows = "".join(json.dumps({"image": image, "prompt": "p"}) + "\n" for image in images)
        (tmp_path / "metadata.jsonl").write_text(rows)
        return UnifiedDataset(tmp_path, special_operator_map={"image": operator})

    return dataset


def test_a_list_of_layers_keeps_its_alpha(layers):
    dataset = layers("whole.png", ["clear.png", "blue.png"])
    assert dataset.scan() == []
    whole, (clear, blue) = dataset[0]["image"], dataset[1]["image"]
    assert (whole.mode, whole.size, whole.getpixel((0, 0))) == ("RGB", (16, 16), (255, 0, 0))
    assert (clear.mode, clear.size, clear.getpixel((0, 0))[3]) == ("RGBA", (16, 16), 0)
    assert (blue.mode, blue.getpixel((0, 0))) == ("RGBA", (0, 0, 255, 255))


def test_the_layer_at_fault_is_named(layers):
    with pytest.raises(
        ValueError, match=r"row 1: image \['clear.png', 'metadata.jsonl'\]: 'metadata.jsonl': is not an"
    ):
        layers(["clear.png", "metadata.jsonl"]).scan()
