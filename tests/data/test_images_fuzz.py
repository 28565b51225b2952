"""Whatever is in an image file: an image of the right shape and type comes out, or an error that names the file."""

import io
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from luna_vision.data.images import PredictDataset
from luna_vision.downstream.windows import FileTensors
from luna_vision.images.decode import SampleError, read_image, to_channels
from luna_vision.images.transforms import eval_transform
from luna_vision.images.values import Raster

FORMATS = ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "PPM", "JPEG2000", "ICO", "TGA", "PCX", "SGI", "IM", "DDS")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "I;16B")
TRANSFORMS = {n: eval_transform((8, 8), (0.5,) * n, (0.5,) * n, None) for n in (1, 3)}


def encoded(mode: str, kind: str, size: tuple[int, int], seed: int) -> bytes | None:
    """A file of noise; None where Pillow cannot write this mode in this format."""
    noise = np.random.default_rng(seed).integers(0, 256, size=4 * 4 * size[0] * size[1], dtype=np.uint8).tobytes()
    image, file = Image.new(mode, size), io.BytesIO()
    try:
        image.frombytes(noise[: len(image.tobytes())])
        image.save(file, kind)
    except (OSError, ValueError, KeyError, SystemError):
        return None
    return file.getvalue()


@st.composite
def damaged(draw) -> bytes:
    """A file of an image: as it was written, cut off, with flipped bits, with a piece of noise, or all noise."""
    size = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    seed = draw(st.integers(0, 2**16))
    content = encoded(draw(st.sampled_from(MODES)), draw(st.sampled_from(FORMATS)), size, seed)
    if content is None:
        content = encoded("RGB", "PNG", size, seed)
    damage = draw(st.sampled_from(["none", "cut", "bits", "head", "noise", "all"]))
    content, chance = bytearray(content), random.Random(seed)
    if damage == "cut":
        return bytes(content[: draw(st.integers(0, len(content)))])
    if damage in ("bits", "head"):  # the head says what is to come
        for _ in range(draw(st.integers(1, 8))):
            at = chance.randrange(min(len(content), 64) if damage == "head" else len(content))
            content[at] ^= 1 << chance.randrange(8)
    if damage == "noise":
        start = chance.randrange(len(content))
        stop = min(start + chance.randrange(1, 64), len(content))
        content[start:stop] = chance.randbytes(stop - start)
    return bytes(content) if damage != "all" else chance.randbytes(draw(st.integers(0, 200)))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "image.bin"


@pytest.fixture(autouse=True)
def limit(monkeypatch):
    """So that no damaged head makes the test take gigabytes."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)


@settings(
    max_examples=200, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(damaged())
def test_any_file_is_an_image_or_named(file: Path, content: bytes):
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = read_image(file)
        except SampleError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            image = None
        if image is not None:
            assert isinstance(image, Image.Image | Raster) and min(image.size) >= 1
        for in_chans in (1, 3):
            try:
                pixels, name = PredictDataset([str(file)], TRANSFORMS[in_chans], in_chans)[0]
            except SampleError as error:
                assert str(file) in str(error) and "\n" not in str(error)
                # Pillow does not convert some modes, and of other bands none is left out
                bands = 1 if image is None or isinstance(image, Image.Image) else image.array.shape[2]
                assert image is None or bands not in (1, 3) or image.mode in ("LAB", "HSV")
                assert isinstance(FileTensors([str(file)], TRANSFORMS[in_chans], in_chans, 40_000)[0], str)
            else:
                assert name == str(file) and pixels.dtype == torch.float32 and pixels.shape == (in_chans, 8, 8)
                assert pixels.isfinite().all() and pixels.abs().max() <= 1.001
                array = np.asarray(to_channels(image, in_chans))
                deep = isinstance(image, Raster)
                assert array.dtype == (np.float32 if deep else np.uint8) and array.shape[:2] == image.size[::-1]
                embedded = FileTensors([str(file)], TRANSFORMS[in_chans], in_chans, 40_000)[0]
                torch.testing.assert_close(embedded, pixels, rtol=0, atol=0)
