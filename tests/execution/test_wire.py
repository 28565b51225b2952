"""What is said to go over the wire is what the exchanges are handed."""

from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from luna_vision.benchmarks.wire import Traffic, image_traffic, layer_traffic, main, ring_attention
from luna_vision.execution.sequence_parallel import SequenceParallel, split_rows

from .test_parallel import WIDTH, image_of, loss_of, make

OPTIONS = [
    {"local_mixing": "before", "global_pool": "avg"},
    {"local_mixing": "mlp", "global_pool": "max", "pack_heads": 1},
    {"local_mixing": "attn", "global_pool": "both"},
    {"local_mixing": "none", "global_pool": "map"},
    {"local_mixing": "attn", "global_pool": "token"},
    {"local_mixing": "before", "global_pool": "avgmax", "memory_len": 7, "depth": 3},
]


def count(group: dist.ProcessGroup, options: dict[str, Any], halved: bool) -> None:
    """Count bytes where they are handed to `torch.distributed`, for two images, forward and backward."""
    model = make(**options)
    model = model.float() if halved else model
    image = image_of(model).to(next(model.parameters()).dtype)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    handed = {"reduced": 0, "sent": 0}
    reduce, swap = dist.all_reduce, dist.batch_isend_irecv

    def all_reduce(x, *args, **kwargs):
        handed["reduced"] += x.nbytes
        return reduce(x, *args, **kwargs)

    def batch_isend_irecv(operations):
        handed["sent"] += sum(o.tensor.nbytes for o in operations if o.op is dist.isend)
        return swap(operations)

    expected = image_traffic(model, -(-WIDTH // 4), neighbours=(rank > 0) + (rank < size - 1))
    itemsize = 4 if halved else 8
    with (
        mock.patch.object(dist, "all_reduce", all_reduce),
        mock.patch.object(dist, "batch_isend_irecv", batch_isend_irecv),
    ):
        loss = loss_of(SequenceParallel(model, group)(split_rows(image, 4, group)))
        found = [dict(handed)]
        handed.update(reduced=0, sent=0)
        loss.backward()
        found.append(handed)
    itemsize = 4 if halved else 8
    assert found == [{"reduced": 2 * t.reduced * itemsize, "sent": 2 * t.sent * itemsize} for t in expected]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_sent(options, ranks):
    for halved in (False, True):
        ranks.run(count, 3, options=options, halved=halved)


def test_the_state_of_the_pack_is_as_large_as_said():
    block = make().blocks[0]  # 16 wide, 2 heads
    assert layer_traffic(block, 3, columns=5) == (Traffic(3 * (16 + 4), 2 * 5 * 16), Traffic(3 * (16 + 2), 2 * 5 * 16))
    assert Traffic(100, 10).bytes_sent(processes=4, itemsize=2) == 100 * 4 * 1.5 + 10 * 2
    assert ring_attention(1000, 16, 4) == (24_000, 48_000)


def test_command(capsys):
    main(["--model", "luna_vit_tiny", "--side", "1600", "--processes", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("100 x 100 = 10,000 patches, 4 processes") and len(lines) == 2 + 2 + 6
    with pytest.raises(ValueError, match="--model must be one of luna_vit_base"):
        main(["--model", "vit_tiny_patch16_224"])
