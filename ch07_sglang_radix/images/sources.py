"""Whatever a user may call a picture -> an upright RGB image, or one ValueError in one line.

    a PIL image, bytes of a file                      always
    data:image/png;base64,..., the base64 alone       always
    a path                                            where whoever asks owns the disk: Engine, not a server
    http://, https://                                 with --allow-image-urls, see fetch.py

A file is judged before it is decoded: its size in bytes, and the size in pixels that its header promises. A picture of a few
hundred bytes may say that it is 50,000 x 50,000, and would take 7.5 GB when it is opened (a decompression bomb). A progressive
JPEG may draw the same pixels over and over, in scans of 30 bytes that take 20 ms each: 20 MB of them take hours.
"""

import base64
import binascii
import io
import re
import struct
import time
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ch07_sglang_radix.images.fetch import TIMEOUT_S, fetch
from common.values import shown

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_BYTES = 20 << 20  # of a file
MAX_PIXELS = 50_000_000  # of a picture before it is resized
MAX_SCANS = 100  # of a JPEG: a progressive one has about ten
MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # not 0: a byte of the picture; not D0 to D7: it goes on
WHITE = (255, 255, 255, 255)  # what shines through transparency, as in transformers


@dataclass(frozen=True)
class Sources:
    """files: paths of this machine are read; urls: pictures are fetched from the net, until a time of time.monotonic()."""

    files: bool = False
    urls: bool = False
    until: float | None = None

    def from_now(self) -> "Sources":
        """For one request: 64 addresses that are slow, one after the other, would keep a thread for minutes."""
        return replace(self, until=time.monotonic() + TIMEOUT_S)

    def picture(self, source: Any) -> Image.Image:
        """Mode RGB. Raises ValueError."""
        if isinstance(source, Image.Image):
            try:
                return upright_rgb(source)
            except OSError as error:  # a file that was opened, but not read yet
                raise ValueError(f"the PIL image cannot be read: {error}") from None
        if isinstance(source, bytes | bytearray | memoryview):
            return decoded(bytes(source))
        if isinstance(source, Path):
            source = str(source)
        if not isinstance(source, str) or not source:
            raise ValueError(f"image_data={shown(source)} must be a path, a URL, base64, bytes or a PIL image")
        return decoded(self._bytes_of(source))

    def _bytes_of(self, source: str) -> bytes:
        if source.startswith("data:"):
            head, _, body = source.partition(",")
            if not head.endswith(";base64"):
                raise ValueError(f"{shown(head)}: a data: URL of a picture is in base64, as data:image/png;base64,...")
            return from_base64(body)
        if source.lower().startswith(("http://", "https://")):
            if not self.urls:
                raise ValueError(
                    "pictures are not fetched from the net; send a data: URL, or start with --allow-image-urls"
                )
            return fetch(source, MAX_BYTES, TIMEOUT_S if self.until is None else self.until - time.monotonic())
        if "://" in source[:16]:
            raise ValueError(f"{shown(source)}: use a data: URL")
        _refuse_long(source)
        if self.files:
            try:
                path = Path(source)
                if path.is_file():
                    if path.stat().st_size > MAX_BYTES:
                        raise ValueError(_too_large(path.stat().st_size))
                    return path.read_bytes()
            except OSError as error:  # no permission; or base64, which is too long for a name
                if error.filename and Path(source).suffix:
                    raise ValueError(f"{shown(source)} cannot be read: {error.strerror}") from None
        try:
            return from_base64(source)
        except ValueError:
            where = "there is no such file, and it" if self.files else "it"
            raise ValueError(f"image_data={shown(source)}: {where} is no base64 of a picture either") from None


def from_base64(text: str) -> bytes:
    _refuse_long(text)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{shown(text)} is not base64") from None


def decoded(data: bytes) -> Image.Image:
    """A file's bytes -> its first frame, upright, mode RGB."""
    if len(data) > MAX_BYTES:
        raise ValueError(_too_large(len(data)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limits warn first; ours are lower, and refuse
            image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header alone
            width, height = image.size
            scans = _scans(data) if data.startswith(b"\xff\xd8") else 1
            if width * height <= MAX_PIXELS and scans <= MAX_SCANS:
                return upright_rgb(image)
    except Image.DecompressionBombError:
        raise ValueError(f"the picture has far more than {MAX_PIXELS:,} pixels; make it smaller") from None
    except (
        OSError,
        ValueError,
        SyntaxError,
        TypeError,
        IndexError,
        KeyError,
        EOFError,
        struct.error,
        zlib.error,
        MemoryError,
    ):
        known = ", ".join(FORMATS)
        raise ValueError(f"{len(data)} bytes are no picture that can be read; use {known}") from None
    if scans > MAX_SCANS:
        raise ValueError(f"a JPEG of {scans} scans; {MAX_SCANS} at most are read, so save it anew")
    raise ValueError(_too_many(width, height))


def _scans(jpeg: bytes) -> int:
    """How often its pixels are drawn over, up to its end: trailers and thumbnails are not looked at."""
    at = count = 0
    while found := MARKER.search(jpeg, at):
        at, kind = found.end(), found[1][0]
        if kind == 0xD9:  # the end
            break
        if kind not in (0x01, 0xD8):  # all others have a length
            count += kind == 0xDA
            at += max(2, int.from_bytes(jpeg[at : at + 2], "big"))
    return count


def upright_rgb(image: Image.Image) -> Image.Image:
    """As transformers does: turned as its EXIF says, transparency on white."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(_too_many(image.width, image.height))
    if not image.width * image.height:
        raise ValueError(f"a picture of {image.width}x{image.height} has no pixels")
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image.convert("RGB")


def _refuse_long(text: str) -> None:
    """Base64 takes 4 characters for 3 bytes."""
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise ValueError(_too_large(len(text) * 3 // 4))


def _too_many(width: int, height: int) -> str:
    return f"a picture of {width}x{height} has more than {MAX_PIXELS:,} pixels; make it smaller"


def _too_large(size: int) -> str:
    return f"a picture of {size:,} bytes is more than the {MAX_BYTES:,} that are read; make it smaller"
