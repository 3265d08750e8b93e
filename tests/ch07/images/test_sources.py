"""What may be called a picture, and what is refused in one line before anything is decoded."""

import base64
import io
import struct
import zlib
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ch07_sglang_radix.images import sources
from ch07_sglang_radix.images.fetch import fetch
from ch07_sglang_radix.images.sources import MAX_BYTES, MAX_PIXELS, Sources
from tests.common.vision.checkpoints import picture

OUTSIDE, INSIDE = Sources(), Sources(files=True)


def as_png(image: Image.Image, **more) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **more)
    return out.getvalue()


IMAGE = picture(40, 30, seed=1)
PNG = as_png(IMAGE)
BASE64 = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "source",
    [IMAGE, PNG, bytearray(PNG), BASE64, f"data:image/png;base64,{BASE64}"],
    ids=["PIL", "bytes", "bytearray", "base64", "data URL"],
)
def test_every_way_to_show_a_picture_shows_the_same(source):
    opened = OUTSIDE.picture(source)
    assert opened.mode == "RGB"
    assert np.array_equal(np.array(opened), np.array(IMAGE))


def test_paths_are_read_for_who_owns_the_disk_and_for_nobody_else(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    for one in (path, str(path)):
        assert np.array_equal(np.array(INSIDE.picture(one)), np.array(IMAGE))
        with pytest.raises(ValueError, match="no base64"):
            OUTSIDE.picture(one)
    with pytest.raises(ValueError, match="no such file"):
        INSIDE.picture(str(tmp_path / "b.png"))


def test_transparency_is_on_white_and_exif_is_obeyed():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert OUTSIDE.picture(as_png(clear)).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    assert OUTSIDE.picture(as_png(IMAGE, exif=exif)).size == (30, 40)


def bomb(width: int, height: int) -> bytes:
    """A few hundred bytes that promise a picture of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(8000, 8000), (20_000, 20_000), (200_000, 200_000), (1 << 30, 1)])
def test_a_decompression_bomb_is_refused_by_its_header(size):
    data = bomb(*size)
    assert len(data) < 300
    with pytest.raises(ValueError, match=r"pixels; make it smaller$|no picture that can be read"):
        OUTSIDE.picture(data)


def scans(times: int) -> bytes:
    """A progressive JPEG whose last scan comes some times more."""
    out = io.BytesIO()
    IMAGE.save(out, "JPEG", progressive=True)
    whole = out.getvalue()
    return whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * times + whole[-2:]


def test_a_jpeg_that_draws_itself_over_and_over_is_refused():
    assert OUTSIDE.picture(scans(0)).size == OUTSIDE.picture(scans(50) + b"\xff\xda" * 200).size == IMAGE.size
    with pytest.raises(ValueError, match=r"^a JPEG of \d+ scans; 100 at most"):
        OUTSIDE.picture(scans(200))


def test_pil_images_are_looked_at_too():
    with pytest.raises(ValueError, match="0x0 has no pixels"):
        OUTSIDE.picture(Image.new("RGB", (0, 0)))
    with pytest.raises(ValueError, match="the PIL image cannot be read"):
        OUTSIDE.picture(Image.open(io.BytesIO(PNG[: len(PNG) // 2])))


def test_all_pictures_of_a_request_have_one_time_to_come_in(monkeypatch):
    clock, asked = iter([100.0, 100.0, 107.0, 111.0]), []  # when it comes, and at each picture
    monkeypatch.setattr(sources, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(sources, "fetch", lambda url, size, seconds: asked.append(seconds) or PNG)
    one_request = Sources(urls=True).from_now()
    for _ in range(3):
        one_request.picture("http://example.com/a.png")
    assert asked == [10.0, 3.0, -1.0]
    with pytest.raises(ValueError, match="takes longer than the 10 s that all pictures of a request have"):
        fetch("http://example.com/a.png", 2000, -1.0)


def test_the_bounds_are_told():
    with pytest.raises(ValueError, match=f"more than the {MAX_BYTES:,}"):
        OUTSIDE.picture(bytes(MAX_BYTES + 1))
    with pytest.raises(ValueError, match=f"more than the {MAX_BYTES:,}"):
        OUTSIDE.picture("A" * (MAX_BYTES * 4 // 3 + 5))
    with pytest.raises(ValueError, match=f"8000x8000 has more than {MAX_PIXELS:,} pixels"):
        OUTSIDE.picture(bomb(8000, 8000))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"", "no picture"), (b"GIF89a", "no picture"), (b"<svg></svg>", "no picture"), (PNG[:60], "no picture"),
        ("", "must be a path"), (7, "must be a path"), (None, "must be a path"), ("no base64!", "no base64"),
        ("data:image/png,abc", "base64"), ("data:image/png;base64,####", "not base64"), ("file:///etc/passwd", "use a data: URL"),
        ("ftp://host/a.png", "use a data: URL"), ("http://example.com/a.png", "--allow-image-urls"),
        ("HTTPS://example.com/a.png", "--allow-image-urls"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_one_line(source, words):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        OUTSIDE.picture(source)
    assert words in str(error.value)


@given(st.binary(max_size=200), st.integers(0, len(PNG)))
@settings(deadline=None, max_examples=200)
def test_damage_is_refused_or_opened_and_nothing_else(noise, at):
    with suppress(ValueError):
        assert OUTSIDE.picture(PNG[:at] + noise + PNG[at + len(noise) :]).mode == "RGB"
