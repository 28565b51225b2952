"""What is allocated stays within the budget, whatever the model, and a budget that is too small says what it takes."""

import re
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from luna_vision.execution import encode
from luna_vision.execution.plan import parse_bytes


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, while they live.

    Attributes:
        peak: The most at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if key and key not in self.known and key not in old:
                    self.known.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.forget, key, storage.nbytes())
        return out

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def allocated(model, image, **arguments) -> tuple[int, int]:
    """Bytes of tensors and of numpy's arrays at the peak, and what the plan said."""
    tracemalloc.start()
    try:
        with Allocations() as count:
            result = encode(model, image, progress=False, **arguments)
        return count.peak + tracemalloc.get_traced_memory()[1], result.peak_bytes
    finally:
        tracemalloc.stop()


@pytest.fixture
def image(photo) -> np.ndarray:
    return np.tile(photo, (2, 1, 1))[:, :513]  # no whole patches


OPTIONS = [
    {},
    {"local_mixing": "mlp"},
    {"local_mixing": "attn", "tie_kv": False},
    {"unpack_form": "projected", "norm_first": False},
    {"stem": "conv", "patch_size": 16},
    {"memory_len": 64, "mlp_ratio": 0.5},
    {"global_pool": "map"},
    {"patch_size": 4, "mlp_ratio": 0.5, "unpack_form": "projected"},
]


@pytest.mark.parametrize(
    "options, disk",
    [
        ({}, True),
        ({"patch_size": 4, "mlp_ratio": 8, "local_mixing": "mlp"}, True),
        *((options, False) for options in OPTIONS),
    ],
    ids=str,
)
def test_the_budget_is_honoured(options, disk, make, image, tmp_path):
    model = make(dtype=torch.float32, **{"embed_dim": 64, "patch_size": 8, "depth": 2, **options})
    store = {"store": tmp_path / "store"} if disk else {}
    used, planned = allocated(model, image, memory_budget="16MB", **store)
    assert used <= planned <= 16_000_000
    assert used > 0.3 * planned  # and a good part of it is used


def test_a_larger_budget_takes_larger_bands(make, image):
    model = make(dtype=torch.float32, embed_dim=64, patch_size=8)
    used = [allocated(model, image, memory_budget=b)[0] for b in ("8MB", "12MB", "20MB")]
    assert used[0] < used[1] < used[2]


@pytest.mark.parametrize("store_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("disk", [False, True])
def test_a_budget_that_is_too_small_says_what_it_takes(store_dtype, disk, make, image, tmp_path):
    model = make(dtype=torch.float32, embed_dim=64, patch_size=16, depth=1)
    arguments = {"store": tmp_path / "store" if disk else None, "store_dtype": store_dtype, "progress": False}
    with pytest.raises(ValueError, match="a memory budget of 10 KB is too small for this image: it takes") as error:
        encode(model, image, memory_budget="10KB", **arguments)
    assert ("with a store on disk" in str(error.value)) == (not disk)
    least = re.search(r"it takes (\d+ [KM]B) at least", str(error.value))[1]
    encode(model, image, memory_budget=least, **arguments)


def test_a_budget_that_is_too_small_is_refused_before_pixels_are_read(make, image, tmp_path):
    class Unread:
        shape, dtype = image.shape, image.dtype

        def __getitem__(self, rows):
            raise AssertionError("read")

    with pytest.raises(ValueError, match="a memory budget of 10 KB is too small for this image"):
        encode(make(), Unread(), memory_budget="10KB", store=tmp_path / "store", progress=False)


def test_chunks_count(make, image):
    class Chunked:
        shape, dtype, chunks = image.shape, image.dtype, (400, 100, 3)

        def __getitem__(self, rows):
            assert rows.start % 400 == 0
            return image[rows]

    model = make(dtype=torch.float32, patch_size=16, depth=1)
    plain, chunked = (encode(model, i, band_rows=1, progress=False).peak_bytes for i in (image, Chunked()))
    assert chunked - plain == 400 * image.shape[1] * 3


def test_one_row_of_chunks_is_held_at_a_time(make, image):
    tall = np.tile(image, (5, 1, 1))

    class Chunked:
        shape, dtype, chunks = tall.shape, tall.dtype, (1500, 100, 3)

        def __getitem__(self, rows):
            return tall[rows].copy()

    model = make(dtype=torch.float32, patch_size=16, depth=1)
    used, planned = allocated(model, Chunked(), band_rows=1)  # of which some begin in one row and end in the next
    assert used <= planned


@pytest.mark.parametrize(
    "text, size",
    [
        ("8GB", 8 * 10**9),
        ("2GiB", 2**31),
        ("500 mb", 5 * 10**8),
        ("1.5K", 1500),
        (123, 123),
        ("7B", 7),
        ("3 MiB", 3 * 2**20),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size
