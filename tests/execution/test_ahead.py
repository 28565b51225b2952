"""Reading ahead: a thread reads the next band of pixels, and nothing else changes; on a GPU nobody waits for a copy."""

import threading
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.gpu.fake import fake_cuda, on_fake_cuda
from luna_vision.execution import encode
from luna_vision.images.pixels import Pixels


class Read:
    """An image that keeps a list of what is read of it, and calls `before` with the number of a read before it."""

    def __init__(self, array: np.ndarray, before=lambda count: None, **others) -> None:
        self.array, self.before, self.reads, self.shape, self.dtype = array, before, [], array.shape, array.dtype
        vars(self).update(others)

    def __getitem__(self, rows: slice) -> np.ndarray:
        self.reads.append((rows.start, rows.stop))
        self.before(len(self.reads) - 1)
        return self.array[rows]


class Windows(Read):
    def window(self, rows: slice, columns: slice) -> np.ndarray:
        return self[rows][:, columns]


def one_by_one(self, spans):
    """`Pixels.ahead` without a thread."""
    for span in spans:
        yield self.raw(*span), self.broken


MASK = np.zeros((16, 11), bool)
MASK[2:6, 3:9] = MASK[9:16, :4] = True


@pytest.mark.parametrize(
    "kind, others, options",
    [
        (Read, {}, {}),
        (Read, {}, {"stem": "conv"}),
        (Read, {"chunks": (16, 16)}, {"local_mixing": "mlp"}),
        (Windows, {"chunks": (16, 16)}, {"mask": MASK}),
        (Windows, {"chunks": (16, 16), "chunk_shift": 5}, {"fill": "mask", "nodata": 60}),
    ],
    ids=str,
)
def test_the_same_bits_by_the_same_reads(kind, others, options, make, photo, monkeypatch):
    names = ("mask", "fill", "nodata")
    how = {name: value for name, value in options.items() if name in names}
    model = make(**{name: value for name, value in options.items() if name not in names})
    ahead, plain = (kind(photo[:61, :43], **others) for _ in range(2))
    got = encode(model, ahead, band_rows=3, progress=False, **how)
    monkeypatch.setattr(Pixels, "ahead", one_by_one)
    want = encode(model, plain, band_rows=3, progress=False, **how)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.raw_memory, want.raw_memory)
    assert ahead.reads == plain.reads and len(ahead.reads) >= 4


def test_a_band_is_read_while_the_one_before_is_computed(make, photo):
    model, computed = make(), threading.Event()
    model.blocks[0].norm1.register_forward_hook(lambda *_: computed.set())

    def wait(count: int) -> None:
        assert count != 1 or computed.wait(60), "the second band was read first"

    image = Read(photo[:61, :43], wait)
    encode(model, image, band_rows=4, progress=False)
    assert len(image.reads) == 4


def test_a_band_that_cannot_be_read_stops_the_run_where_it_did(make, photo, tmp_path):
    def fail(count: int) -> None:
        if count == 3:
            raise RuntimeError("the tile is\n damaged")

    model, image = make(), photo[:61, :43]
    torn = Read(image, fail)
    with pytest.raises(OSError, match="cannot read the pixel rows 32 to 47 of the image: the tile is damaged"):
        encode(model, torn, band_rows=4, store=tmp_path / "store", progress=False)
    assert torn.reads == [(0, 1), (0, 16), (16, 32), (32, 48)]  # and nothing beyond
    whole = Read(image)
    got = encode(model, whole, band_rows=4, store=tmp_path / "store", progress=False)
    assert whole.reads == [(0, 1), (32, 48), (48, 61)]
    assert torch.equal(got.logits, encode(model, image, band_rows=4, progress=False).logits)


def test_an_interruption_leaves_no_thread_that_reads(make, photo, tmp_path):
    model, image = make(), photo[:61, :43]
    before, slow = threading.active_count(), Read(image)

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    hook = model.blocks[0].norm1.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        encode(model, slow, band_rows=4, store=tmp_path / "store", progress=False)
    reads = list(slow.reads)
    assert len(reads) <= 3 and threading.active_count() == before
    hook.remove()
    got = encode(model, image, band_rows=4, store=tmp_path / "store", progress=False)
    assert slow.reads == reads
    assert torch.equal(got.logits, encode(model, image, band_rows=4, progress=False).logits)


class Moves(TorchDispatchMode):
    """Collects the copies of tensors between devices: from, to, shape, and whether nobody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[str, str, tuple[int, ...], bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            found = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            moved = found[-1].device.type, out.device.type
            if moved[0] != moved[1]:
                waits = not ((kwargs or {}).get("non_blocking") or args[2:] == (True,))
                self.ran.append((*moved, tuple(out.shape), waits))
        return out


@pytest.mark.parametrize("fits", [True, False])
def test_on_a_gpu_the_patches_stay_there_if_they_fit_and_nobody_waits(fits, photo):
    model = timm.create_model("test_luna_vit", num_classes=7, depth=2).eval().to("meta")
    free = 10**9 if fits else 10**5
    cudart = mock.Mock(**{"cudaHostRegister.return_value": 0})
    fakes = {
        "torch.cuda.mem_get_info": lambda device: (free, 2**40),
        "torch.cuda.cudart": lambda: cudart,
        "torch.cuda.synchronize": lambda device: None,
        "torch.Tensor.pin_memory": lambda self: self,
    }
    with fake_cuda(torch.bfloat16):
        model = on_fake_cuda(model)
        with Moves() as moves:
            for name, fake in fakes.items():
                mock.patch(name, fake).start()
            try:
                encode(model, photo[:128, :96], band_rows=3, progress=False)
            finally:
                mock.patch.stopall()
    width = model.embed_dim
    patches = [move for move in moves.ran if len(move[2]) > 1 and move[2][-1] == width and move[2][-2] > 8]
    pixels = [move for move in moves.ran if move[2][-1] == 3 and len(move[2]) == 3]
    assert len(pixels) == 3 and not any(waits for *_, waits in patches + pixels)
    assert {move[:2] for move in patches} == (set() if fits else {("cuda", "cpu"), ("cpu", "cuda")})
    assert cudart.cudaHostRegister.called == cudart.cudaHostUnregister.called == (not fits)
