"""What is kept between two layers, and where."""

import torch

from luna_vision.execution.store import FileRows


class Elsewhere(torch.Tensor):
    """A tensor of which numpy can see nothing until it is brought to the CPU, as of one on a GPU."""

    def to(self, *args, **kwargs):
        out = super().to(*args, **kwargs)
        return out.as_subclass(torch.Tensor) if "cpu" in map(str, args) else out

    def numpy(self, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def test_rows_from_a_gpu_come_into_the_file(tmp_path):
    want = torch.arange(12.0).view(3, 4)
    rows = FileRows(tmp_path / "rows.bin", 3, 4, torch.float32)
    rows.write(0, want.as_subclass(Elsewhere))
    assert torch.equal(rows.read(0, 3), want)
    rows.close()
