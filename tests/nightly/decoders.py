"""Damage small files of every format, and read them by every reader: `python tests/nightly/decoders.py`.

Not a test of pytest's: it takes minutes (tests/images/test_damaged.py does a few hundred files with a fixed seed). A
damaged file gives pixels, or an error of one line that names it; or there is no room for it. Anything else, a traceback
of a decoder, a process that dies or that takes longer than a minute for a file, is printed, kept and ends in exit
code 1. The counts are written to --out, which docs/pixels.md is about.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
import zarr
from PIL import Image
from sklearn.datasets import load_sample_image

from luna_vision.images import open_image
from luna_vision.images.decode import SampleError, read_image, to_channels
from luna_vision.images.pillow import has_heif
from luna_vision.images.pixels import Pixels
from luna_vision.utils.errors import is_check
from luna_vision.utils.files import write_json
from luna_vision.utils.record import machine

MODES = ("RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "I;16", "F")
LIMIT = 60  # seconds that a file may take
MEMORY = 8 * 2**30  # bytes of address space that a process may take
BUDGET = 256 * 2**20  # bytes that an image may hold while it is read by rows, as a memory budget of `encode`
PIXELS = 10**6  # of an image that is decoded as a whole
WORDS = (0, 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 10**5, 10**9)


def picture() -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg")[100:133, 200:241])


def samples() -> dict[str, bytes]:
    """A small file of every format that can be written here, and some of several kinds, by name."""
    Image.init()
    has_heif()
    found: dict[str, bytes] = {}

    def add(name: str, save: Callable[[io.BytesIO], object]) -> None:
        buffer = io.BytesIO()
        try:
            save(buffer)
        except (OSError, ValueError, KeyError, TypeError):  # of a mode that a format has not
            return
        found[name] = buffer.getvalue()

    for format_ in sorted(set(Image.SAVE) & set(Image.OPEN) - {"EPS", "WMF", "HDF5", "GRIB", "BUFR"}):
        taken = 0
        for mode in MODES:
            name = f"{format_.lower()} {mode}"
            image = picture().convert("L" if mode in ("I;16", "F") else "RGB").convert(mode)
            add(name, lambda buffer, image=image, format_=format_: image.save(buffer, format_))
            taken += name in found
            if taken == 3 and format_ not in ("PNG", "TIFF"):
                break
    add("jpeg progressive", lambda buffer: picture().save(buffer, "jpeg", progressive=True))
    rgb = np.asarray(picture())
    deep = rgb.astype(np.uint16) * 257
    found["png 16"] = imagecodecs.png_encode(deep)
    found["jp2 16"] = imagecodecs.jpeg2k_encode(deep, level=0, reversible=True)
    found["ppm 16"] = f"P6\n{rgb.shape[1]} {rgb.shape[0]}\n65535\n".encode() + deep.astype(">u2").tobytes()
    card = [f"{'SIMPLE':8}= {'T':>20}", f"{'BITPIX':8}= {8:>20}", f"{'NAXIS':8}= {2:>20}"]
    card += [f"{'NAXIS1':8}= {rgb.shape[1]:>20}", f"{'NAXIS2':8}= {rgb.shape[0]:>20}", "END"]
    found["fits"] = "".join(line.ljust(80) for line in card).ljust(2880).encode() + rgb[:, :, 0].tobytes()
    add("npy", lambda buffer: np.save(buffer, rgb))
    add("npy 16", lambda buffer: np.save(buffer, deep[:, :, 0]))
    for name, options in {
        "tiles deflate": {"tile": (16, 16), "compression": "deflate", "predictor": True},
        "strips lzw": {"rowsperstrip": 7, "compression": "lzw"},
        "packbits": {"compression": "packbits"},
        "zstd planes": {"compression": "zstd", "planarconfig": "separate"},
        "tiles jpeg": {"tile": (16, 16), "compression": "jpeg"},
        "jpeg2000": {"compression": "jpeg2000"},
        "webp": {"compression": "webp"},
        "big": {"bigtiff": True, "tile": (32, 32)},
        "turned": {"extratags": [(274, 3, 1, 6, True)]},
        "jpegxl": {"compression": "jpegxl"},
    }.items():
        array = rgb.transpose(2, 0, 1) if "planarconfig" in options else rgb
        add(f"tiff {name}", lambda b, o=options, a=array: tifffile.imwrite(b, a, photometric="rgb", metadata=None, **o))
    for bits in (1, 4, 12):
        grey = (deep[:, :, 0] >> (16 - bits)).astype(bool if bits == 1 else np.uint8 if bits == 4 else np.uint16)
        options = {"photometric": "minisblack", "metadata": None, "bitspersample": bits}
        add(f"tiff {bits} bits", lambda buffer, g=grey, o=options: tifffile.imwrite(buffer, g, **o))
    floats = (rgb[:, :, 0] / 255).astype(np.float32)
    options = {"photometric": "minisblack", "metadata": None, "compression": "deflate", "predictor": True}
    options["extratags"] = [(42113, 2, 6, "-9999", True)]
    add("tiff float", lambda buffer: tifffile.imwrite(buffer, floats, **options))
    return found


def damage(content: bytes, rng: random.Random) -> bytes:
    """The content with a few bytes changed, cut off, repeated or overwritten by numbers, often near its beginning."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 10])):
        if not data:
            break
        at = rng.randrange(min(len(data), rng.choice([32, 200, len(data)])))
        kind = rng.randrange(8)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at] = rng.randrange(256)
        elif kind == 3:
            data[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(WORDS))
        elif kind == 4:
            data[at : at + 2] = struct.pack(rng.choice("<>") + "H", rng.choice(WORDS) % 2**16)
        elif kind == 5:
            end = at + rng.randrange(1, 40)
            data[at:at] = data[at:end]
        elif kind == 6:
            del data[at : at + rng.randrange(1, 40)]
        else:
            digits = [i for i, byte in enumerate(data[:200]) if 48 <= byte < 58]  # of headers that are text
            if digits:
                at = rng.choice(digits)
                data[at : at + 1] = rng.choice([b"0", b"-1", b"99999999", b"9" * 30])
    return bytes(data)


def read_whole(path: Path) -> None:
    """As training, prediction and embeddings do."""
    image = read_image(path)
    for in_chans in (1, 3):
        try:
            np.asarray(to_channels(image, in_chans))
        except SampleError as error:  # of bands, which its callers give the name to
            raise SampleError(f"cannot use {path}: {error}") from error


def read_rows(path: Path) -> None:
    """As `encode` does, which refuses what does not fit into its budget before it reads pixels."""
    image = open_image(path)
    bands = image.shape[2] if len(image.shape) == 3 else 1
    pixels = Pixels(image, bands, (0.5,) * bands, (0.5,) * bands)
    height, width = pixels.shape[:2]
    if pixels.held_bytes + pixels.band_bytes(8, width) > BUDGET or height > PIXELS:
        raise MemoryError
    for start in range(0, height, 8):
        pixels.rows(start, min(start + 8, height))


READERS = {"whole": read_whole, "rows": read_rows}


def outcome(reader: str, path: Path) -> str:
    """ "pixels", "named", "no room", or what went wrong."""
    try:
        READERS[reader](path)
    except MemoryError:
        return "no room"
    except (ValueError, OSError) as error:
        message = str(error)
        if path.name in message and "\n" not in message and (isinstance(error, OSError) or is_check(error)):
            return "named"
        return f"not a line that names the file: {traceback.format_exc()}"
    except Exception:  # which is what is looked for
        return traceback.format_exc()
    return "pixels"


def tried(
    name: str, content: bytes, seed: int, folder: Path, until: Callable[[int], bool]
) -> tuple[Counter, list[str]]:
    """Damage a file again and again, and read it; returns how often there was what, and what went wrong."""
    rng, counts, wrong = random.Random(f"{name} {seed}"), Counter(), []
    path, count = folder / "damaged.bin", 0
    while until(count):
        count += 1
        path.write_bytes(damage(content, rng))
        for reader in READERS:
            found = outcome(reader, path)
            fine = found in ("pixels", "named", "no room")
            counts[f"{reader}: {found if fine else 'wrong'}"] += 1
            if not fine and len(wrong) < 3:
                kept = folder / f"wrong-{name.replace(' ', '-').replace(';', '')}-{len(wrong)}.bin"
                shutil.copy(path, kept)
                wrong.append(f"{reader} {kept}: {found}")
    return counts, wrong


def zarr_samples(folder: Path) -> list[Path]:
    paths = []
    for version in (2, 3):
        path = folder / f"v{version}.zarr"
        zarr.create_array(path, data=np.asarray(picture()), chunks=(16, 16, 3), zarr_format=version)
        paths.append(path)
    return paths


def tried_zarr(seed: int, folder: Path, until: Callable[[int], bool]) -> tuple[Counter, list[str]]:
    """The same of folders of zarr, of which one file is damaged at a time."""
    rng, counts, wrong, count = random.Random(seed), Counter(), [], 0
    originals = zarr_samples(folder)
    while until(count):
        count += 1
        path = folder / "damaged.zarr"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(rng.choice(originals), path)
        file = rng.choice([file for file in path.rglob("*") if file.is_file()])
        file.write_bytes(damage(file.read_bytes(), rng))
        found = outcome("rows", path)
        fine = found in ("pixels", "named", "no room")
        counts[f"rows: {found if fine else 'wrong'}"] += 1
        if not fine and len(wrong) < 3:
            wrong.append(f"rows {file.name}: {found}")
    return counts, wrong


def work(name: str, content: bytes | None, seed: int, seconds: float, folder: Path) -> None:
    """In a process of its own: results go to a file."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    Image.MAX_IMAGE_PIXELS = PIXELS // 2
    warnings.simplefilter("ignore")
    os.dup2(os.open(folder / "noise.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)  # decoders talk
    end = time.monotonic() + seconds

    def until(count: int) -> bool:
        signal.alarm(LIMIT)  # ends the process
        return time.monotonic() < end

    counts, wrong = tried_zarr(seed, folder, until) if content is None else tried(name, content, seed, folder, until)
    (folder / "result.json").write_text(json.dumps([counts, wrong]))


def work_together(files: int, seed: int, folder: Path) -> None:
    """A few files of every kind, in one process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    Image.MAX_IMAGE_PIXELS = PIXELS // 2
    warnings.simplefilter("ignore")
    results = {}
    for name, content in {**samples(), "zarr": None}.items():

        def until(count: int) -> bool:
            signal.alarm(LIMIT)
            return count < files

        given = (seed, folder, until)
        results[name] = tried_zarr(*given) if content is None else tried(name, content, *given)
    (folder / "result.json").write_text(json.dumps(results))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each kind of file (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds of which the name begins with this")
    parser.add_argument("--out", type=Path, help="JSON of the counts")
    args = parser.parse_args()
    kinds: dict[str, bytes | None] = {**samples(), "zarr": None}
    results, bad = {}, 0
    for name, content in kinds.items():
        if not name.startswith(args.only):
            continue
        folder = Path(tempfile.mkdtemp(prefix="decoders-"))
        process = multiprocessing.get_context("fork").Process(
            target=work, args=(name, content, args.seed, args.seconds, folder)
        )
        process.start()
        process.join()
        if process.exitcode:
            counts, wrong = {"died": 1}, [f"the process ended with {process.exitcode} at {folder / 'damaged.bin'}"]
        else:
            counts, wrong = json.loads((folder / "result.json").read_text())
        results[name], bad = counts, bad + len(wrong)
        print(f"{name:20} {', '.join(f'{what} {n}' for what, n in sorted(counts.items()))}", flush=True)
        for text in wrong:
            print(text, flush=True)
        if not wrong:
            shutil.rmtree(folder)
    total = sum((Counter(counts) for counts in results.values()), Counter())
    print(f"{len(results)} kinds of file, {total.total()} readings: {dict(total)}")
    if args.out:
        write_json(args.out, {"seconds": args.seconds, "kinds": results, "total": total, "machine": machine("cpu")})
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
