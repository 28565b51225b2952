"""Images from strangers: no code of theirs runs, no other file is opened, nothing takes more memory than it says."""

import io
import json
import os
import pickle
import shutil
import tracemalloc
from pathlib import Path

import imagecodecs
import numcodecs
import numpy as np
import pytest
import tifffile
import torch
import zarr
from PIL import EpsImagePlugin, Image
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec

from luna_vision.cli.common import run_command
from luna_vision.cli.encode import main
from luna_vision.data import read_image
from luna_vision.execution import encode
from luna_vision.images import open_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # zarr's, of codecs that it has not settled
LARGE = 400_000_000  # bytes


@pytest.fixture
def picture(photo) -> np.ndarray:
    return photo[100:237, 200:311]


def refused(capsys, image: Path, *words: str) -> str:
    """What the command says of an image that it does not read, in one line."""
    words = [str(image), "--out", str(image.parent / "o.npz"), "--model", "test_luna_vit", *words]
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main([*words, "--device", "cpu"]))
    assert stop.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "RANDOM WEIGHTS" not in x]
    assert line.startswith("error: ")
    return line


def refused_within(capsys, size: int, image: Path, *words: str) -> str:
    """The same, with that many bytes at most for Python and numpy, which is where decoders put their results."""
    tracemalloc.start()
    try:
        return refused(capsys, image, *words)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < size, f"{peak:,} bytes"


# ---- code


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("codecs", [["pickle"], ["json2", "pickle"], ["vlen-utf8", "pickle"], ["msgpack2"], ["lzma"]])
@pytest.mark.parametrize("place", ["filters", "compressor"])
def test_codecs_that_could_run_code(codecs, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a.zarr"
    zarr.create_array(folder, data=np.zeros((8, 8), np.uint8), chunks=(8, 8), zarr_format=2, compressors=None)
    about = json.loads((folder / ".zarray").read_text())
    about |= {"dtype": "|O" if place == "filters" else "|u1", "fill_value": None}
    about[place] = [{"id": name} for name in codecs] if place == "filters" else {"id": codecs[-1]}
    (folder / ".zarray").write_text(json.dumps(about))
    (folder / "0.0").write_bytes(pickle.dumps([Hostile()]))
    assert "a.zarr" in refused(capsys, folder) and not Path("unpickled").exists()


@pytest.mark.parametrize("name", ["numcodecs.pickle", "vlen-utf8", "numcodecs.zlib"])
def test_codecs_of_format_3_that_are_not_known(name, tmp_path, capsys):
    folder = tmp_path / "a.zarr"
    zarr.create_array(folder, data=np.zeros((8, 8), np.uint8), chunks=(8, 8))
    about = json.loads((folder / "zarr.json").read_text())
    about["codecs"] = [{"name": name, "configuration": {}}]
    (folder / "zarr.json").write_text(json.dumps(about))
    assert "a.zarr" in refused(capsys, folder)


# ---- zarr: pixels


BYTES = {"blosc": BloscCodec(), "gzip": GzipCodec(), "zstd": ZstdCodec()}
KINDS = {
    **{f"{name}, format 3": {"compressors": codec} for name, codec in BYTES.items()},
    **{f"{name}, shards": {"compressors": codec, "shards": (60, 80, 3)} for name, codec in BYTES.items()},
    "checksum": {"compressors": [ZstdCodec(), Crc32cCodec()]},
    "checksum inside": {"compressors": [Crc32cCodec(), ZstdCodec()]},
    "transposed": {"filters": [TransposeCodec(order=(2, 0, 1))]},
    "plain": {"compressors": None},
    "plain, shards": {"compressors": None, "shards": (30, 120, 3)},
    **{
        f"{codec.codec_id}, format 2": {"compressors": codec, "zarr_format": 2}
        for codec in (numcodecs.Blosc(), numcodecs.GZip(), numcodecs.Zlib(), numcodecs.Zstd(), numcodecs.LZ4())
    },
    "filters": {"filters": [numcodecs.Delta("u1"), numcodecs.Shuffle(1)], "zarr_format": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_of_a_zarr_array(kind, picture, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, picture.shape, np.uint8)  # which takes more when it is compressed
    for name, image in (("a.zarr", picture), ("b.zarr", noise)):
        zarr.create_array(tmp_path / name, data=image, chunks=(30, 40, 3), **KINDS[kind])
        opened = open_image(tmp_path / name)
        np.testing.assert_array_equal(opened[0:137], image)
        np.testing.assert_array_equal(opened[30:60], image[30:60])


# ---- zarr: memory


def encoded(name: str) -> bytes:
    """Much in little."""
    return {
        "blosc": numcodecs.Blosc("zstd"),
        "gzip": numcodecs.GZip(9),
        "lz4": numcodecs.LZ4(),
        "zlib": numcodecs.Zlib(9),
        "zstd": numcodecs.Zstd(9),
    }[name].encode(np.zeros(LARGE, np.uint8))


def only_chunk(folder: Path) -> Path:
    return next(path for path in folder.rglob("*") if path.is_file() and path.name not in ("zarr.json", ".zarray"))


@pytest.mark.parametrize("name", ["blosc", "gzip", "lz4", "zlib", "zstd"])
def test_a_chunk_that_expands_is_refused(name, tmp_path, capsys):
    codec = {"blosc": numcodecs.Blosc("zstd"), "lz4": numcodecs.LZ4(), "zlib": numcodecs.Zlib()}
    kinds = [
        {"zarr_format": 2, "compressors": codec.get(name, numcodecs.GZip() if name == "gzip" else numcodecs.Zstd())}
    ]
    if name in BYTES:
        kinds += [{"compressors": BYTES[name]}]
    bomb = encoded(name)
    for kind in kinds:
        folder = tmp_path / "a.zarr"
        shutil.rmtree(folder, ignore_errors=True)
        zarr.create_array(folder, data=np.ones((2048, 2048), np.uint8), chunks=(2048, 2048), **kind)
        only_chunk(folder).write_bytes(bomb)
        assert "pixel rows 0" in refused_within(capsys, 10**8, folder, "--memory-budget", "500MB")


def shard(chunks: list[bytes], ranges: list[tuple[int, int]] | None = None) -> bytes:
    """A shard of these chunks; with an index that says something else, if that is given."""
    ends = np.cumsum([len(chunk) for chunk in chunks])
    index = np.array(ranges or [(end - len(chunk), len(chunk)) for end, chunk in zip(ends, chunks, strict=True)], "<u8")
    return b"".join(chunks) + index.tobytes() + np.uint32(imagecodecs.h5checksum_crc32c(index.tobytes())).tobytes()


def crc32c(data: bytes) -> bytes:
    import google_crc32c  # what zarr takes

    return np.uint32(google_crc32c.value(data)).tobytes()


@pytest.mark.parametrize("case", ["a chunk that expands", "chunks that are the whole shard", "no chunks of its own"])
def test_shards(case, tmp_path, capsys):
    folder = tmp_path / "a.zarr"
    array = zarr.create_array(
        folder, shape=(2048, 2048), dtype="u1", chunks=(128, 128), shards=(2048, 2048), compressors=ZstdCodec()
    )
    array[:] = np.random.default_rng(0).integers(0, 256, (2048, 2048), np.uint8)
    if case == "no chunks of its own":
        about = json.loads((folder / "zarr.json").read_text())
        about["codecs"].append({"name": "zstd", "configuration": {"level": 0, "checksum": False}})
        (folder / "zarr.json").write_text(json.dumps(about))
        assert "it has the codec sharding_indexed" in refused(capsys, folder)
        return
    path = only_chunk(folder)
    content = path.read_bytes()
    content, index = content[: -4 - 16 * 256], np.frombuffer(content[-4 - 16 * 256 : -4], "<u8").reshape(256, 2).copy()
    if case == "a chunk that expands":
        bomb = encoded("zstd")
        index[0] = (len(content), len(bomb))
        content += bomb
    else:
        index[:] = (0, len(content))
    path.write_bytes(content + index.tobytes() + crc32c(index.tobytes()))
    assert "pixel rows 0" in refused_within(capsys, 10**8, folder, "--memory-budget", "500MB")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_chunk_that_is_no_file_is_missing(kind, tmp_path):
    """It would be read for ever."""
    zarr.create_array(tmp_path / "a.zarr", data=np.ones((8, 8), np.uint8))
    path = only_chunk(tmp_path / "a.zarr")
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    assert open_image(tmp_path / "a.zarr")[0:8].sum() == 0


@pytest.mark.parametrize("kind", ["zarr2", "zarr3", "shards", "tiles", "strips"])
def test_chunks_that_are_too_large_for_the_budget(kind, tmp_path, capsys):
    """By what the file says, before anything is decoded: 10,000 million numbers for an image of a few."""
    path, image = tmp_path / ("a.zarr" if "zarr" in kind or kind == "shards" else "a.tif"), np.zeros((64, 64), np.uint8)
    if path.suffix == ".zarr":
        chunks = {"chunks": (100_000, 100_000)}
        if kind == "shards":
            chunks = {"chunks": (64, 64), "shards": (64, 64 * 10**8)}
        zarr.create_array(path, shape=(64, 64), dtype="u1", zarr_format=2 if kind == "zarr2" else 3, **chunks)
    else:
        tifffile.imwrite(path, image, tile=(64, 64) if kind == "tiles" else None, compression="zlib")
        with tifffile.TiffFile(path, mode="r+") as file:
            for name in (
                ("TileWidth", "TileLength") if kind == "tiles" else ("ImageWidth", "ImageLength", "RowsPerStrip")
            ):
                file.pages[0].tags[name].overwrite(100_000 if kind != "thin strips" else 2**31 - 1)
    line = refused_within(capsys, 10**8, path, "--memory-budget", "200MB")
    assert "too small for this image" in line


# ---- TIFF


def put_tile(path: Path, content: bytes) -> None:
    """Put something else in the place of the first tile."""
    size = path.stat().st_size
    with tifffile.TiffFile(path, mode="r+") as file:
        page = file.pages[0]
        page.tags["TileOffsets"].overwrite([size, *page.dataoffsets[1:]])
        page.tags["TileByteCounts"].overwrite([len(content), *page.databytecounts[1:]])
    with path.open("r+b") as file:
        file.seek(size)
        file.write(content)


@pytest.mark.parametrize("name", ["jpeg", "jpeg2000", "webp"])
def test_a_tile_that_is_a_larger_image_is_refused(name, picture, tmp_path, capsys):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture, photometric="rgb", tile=(64, 64), compression=name)
    np.testing.assert_allclose(
        open_image(path)[0:137].astype(int), picture.astype(int), atol=255 if name == "jpeg" else 60
    )
    image = io.BytesIO()
    Image.new("RGB", (5000, 5000)).save(image, "JPEG2000" if name == "jpeg2000" else name.upper())
    put_tile(path, image.getvalue())
    line = refused_within(capsys, 5 * 10**7, path, "--memory-budget", "500MB")
    assert "a tile of 12288 numbers is an image of 75000000" in line


def test_strips_of_jpeg_that_share_their_tables(picture, tmp_path):
    """As libtiff writes them."""
    Image.fromarray(picture).save(tmp_path / "a.tif", compression="jpeg", strip_size=3000)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.pages[0].jpegtables and len(file.pages[0].dataoffsets) > 1
    assert np.abs(open_image(tmp_path / "a.tif")[0:137].astype(int) - picture).mean() < 10


@pytest.mark.parametrize("name", ["zlib", "packbits", "zstd"])
def test_a_tile_that_expands_is_refused(name, tmp_path, capsys):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((64, 64), np.uint8), tile=(64, 64), compression=name)
    zeros = np.zeros(LARGE, np.uint8).tobytes()
    put_tile(path, b"\x81\0" * (LARGE // 128) if name == "packbits" else getattr(imagecodecs, f"{name}_encode")(zeros))
    assert "pixel rows 0" in refused_within(capsys, 10**8, path, "--memory-budget", "500MB")


def test_compressions_that_are_not_bounded(picture, tmp_path, capsys):
    tifffile.imwrite(tmp_path / "a.tif", picture, photometric="rgb", tile=(64, 64), compression="jpegxl")
    assert "a.tif has the compression JPEGXL" in refused(capsys, tmp_path / "a.tif")


# ---- other files


def ome(path: Path, planes: np.ndarray, *files: tuple[str, str], own: str = "urn:uuid:1") -> None:
    """An OME-TIFF of two channels, whose planes are said to be in these files: (name, UUID)."""
    described = "".join(
        f'<TiffData FirstC="{i}" IFD="0" PlaneCount="1"><UUID FileName="{name}">{uuid}</UUID></TiffData>'
        for i, (name, uuid) in enumerate(files)
    )
    height, width = planes.shape[-2:]
    sizes = {"X": width, "Y": height, "C": len(files), "Z": 1, "T": 1}
    pixels = 'DimensionOrder="XYCZT" Type="uint8" ' + " ".join(f'Size{axis}="{n}"' for axis, n in sizes.items())
    xml = f'<OME UUID="{own}"><Image ID="Image:0"><Pixels ID="Pixels:0" {pixels}>{described}</Pixels></Image></OME>'
    tifffile.imwrite(path, planes, photometric="minisblack", description=f"<?xml version='1.0'?>{xml}", metadata=None)


@pytest.mark.parametrize("where", ["secret.ome.tif", "../secret.ome.tif", "{folder}/secret.ome.tif"])
def test_files_that_an_ome_tiff_names_are_not_opened(where, photo, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    grey = np.ascontiguousarray(photo[:64, :64, 0])
    other = tmp_path / "secret.ome.tif" if where.startswith(("..", "{")) else folder / "secret.ome.tif"
    ome(other, grey, ("secret.ome.tif", "urn:uuid:2"), own="urn:uuid:2")
    where = where.format(folder=tmp_path)
    ome(folder / "a.ome.tif", grey, ("a.ome.tif", "urn:uuid:1"), (where, "urn:uuid:2"))
    opened, real = [], tifffile.FileHandle.open
    monkeypatch.setattr(tifffile.FileHandle, "open", lambda self: opened.append(self.path) or real(self))
    line = refused(capsys, folder / "a.ome.tif")
    assert f"there are pixels in other files, such as '{where}'" in line
    assert opened and not any("secret" in path for path in opened)


def test_an_ome_tiff_of_one_file(photo, tmp_path):
    """As it was written, and under another name; and the levels of a pyramid, and channels that are planes."""
    rgb, grey = photo[:64, :64], np.ascontiguousarray(photo[:64, :64, 0])
    ome(tmp_path / "a.ome.tif", grey, ("a.ome.tif", "urn:uuid:1"))
    os.rename(tmp_path / "a.ome.tif", tmp_path / "b.ome.tif")
    ome(tmp_path / "a.ome.tif", grey, ("a.ome.tif", "urn:uuid:1"))
    for name in ("a.ome.tif", "b.ome.tif"):
        np.testing.assert_array_equal(open_image(tmp_path / name)[0:64].squeeze(), grey)
    with tifffile.TiffWriter(tmp_path / "c.ome.tif", ome=True) as file:
        planes = np.ascontiguousarray(rgb.transpose(2, 0, 1))
        file.write(planes, photometric="minisblack", metadata={"axes": "CYX"}, tile=(32, 32), subifds=1)
        file.write(planes[:, ::2, ::2].copy(), photometric="minisblack", tile=(32, 32), subfiletype=1)
    np.testing.assert_array_equal(open_image(tmp_path / "c.ome.tif")[0:64], rgb)
    np.testing.assert_array_equal(open_image(tmp_path / "c.ome.tif", 1)[0:32], rgb[::2, ::2])


@pytest.mark.parametrize("path", ["../b.zarr", "/b.zarr", "0/../../b.zarr"])
def test_levels_outside_a_zarr_group(path, tmp_path, capsys):
    zarr.create_array(tmp_path / "b.zarr", data=np.zeros((8, 8), np.uint8))
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    group.attrs["multiscales"] = [{"axes": ["y", "x"], "datasets": [{"path": path}]}]
    assert "a.zarr" in refused(capsys, tmp_path / "a.zarr")


# ---- what is written


LINKS = ["store/patches.bin", "store/new-state.pt", "grid.npy.partial", ".o.npz.partial.npz"]


@pytest.mark.parametrize("name", LINKS)
def test_links_are_not_followed(name, photo, tmp_path):
    victim, image = tmp_path / "victim", tmp_path / "a.npy"
    victim.write_text("precious")
    np.save(image, photo[:20, :20])
    (tmp_path / "store").mkdir()
    (tmp_path / name).symlink_to(victim)
    words = [str(image), "--out", str(tmp_path / "o.npz"), "--grid", str(tmp_path / "grid.npy")]
    words += ["--store", str(tmp_path / "store"), "--model", "test_luna_vit", "--device", "cpu"]
    assert main(words) == 0
    assert victim.read_text() == "precious" and (tmp_path / "grid.npy").is_file()


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
@pytest.mark.parametrize("what", ["", ".partial"])
def test_folders_that_are_no_array_are_not_removed(suffix, what, make, photo, tmp_path):
    folder = tmp_path / f"grid{suffix}{what}"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(OSError, match=f"grid{suffix}{what}"):
        encode(make(), photo[:20, :20], grid=tmp_path / f"grid{suffix}", progress=False)
    assert (folder / "mine.txt").read_text() == "mine"
    shutil.rmtree(folder)
    encode(make(), photo[:20, :20], grid=tmp_path / f"grid{suffix}", progress=False)


def test_a_users_own_state_is_not_removed(make, photo, tmp_path):
    """Of a folder that somebody keeps weights in, and gives as the store."""
    torch.save({"weight": torch.ones(3)}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="state.pt is not the state of a run"):
        encode(make(), photo[:20, :20], store=tmp_path, progress=False)
    assert torch.load(tmp_path / "state.pt")["weight"].sum() == 3


# ---- programs


@pytest.mark.parametrize("name", ["a.eps", "a.png", "a.jpg"])
def test_no_other_program_draws_an_image(name, tmp_path, monkeypatch, capsys):
    """Pillow has PostScript drawn by Ghostscript, whatever the file is called."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    lines = ["%!PS-Adobe-3.0 EPSF-3.0", "%%BoundingBox: 0 0 16 16", "%%EndComments", "(x) print", "%%EOF", ""]
    (tmp_path / name).write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"{name}: not an image"):
        read_image(tmp_path / name)
    assert f"{name} is not an image" in refused(capsys, tmp_path / name)
