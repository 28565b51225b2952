"""An image in strips on several processes gives what one process gives, forward and backward."""

import time
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import luna_vision  # noqa: F401  registers the models
from luna_vision.execution import set_band_checkpointing
from luna_vision.execution.collectives import shared_max
from luna_vision.execution.sequence_parallel import SequenceParallel, row_ranges, split_rows
from luna_vision.mixers import MIXERS

from .conftest import OPTIONS
from .ranks import Ranks

SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "memory_len": 3, "num_classes": 5}
HEIGHT, WIDTH = 27, 18  # 7 x 5 patches, none of the last ones whole
EVERY_OPTION = [
    *OPTIONS,
    *({"last_block": b, "global_pool": "token", "local_mixing": "attn"} for b in ("patches", "both", "final_pack")),
]


# ---------------------------------------------------------------- jobs, which run on the processes


def make(**arguments: Any) -> nn.Module:
    """A model with weights far from where they start, the same on all processes."""
    torch.manual_seed(0)
    model = timm.create_model("test_luna_vit", **{**SMALL, **arguments}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def image_of(model: nn.Module, height: int = HEIGHT, width: int = WIDTH, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(batch, model.in_chans, height, width, generator=generator, dtype=torch.float64)
    return image + torch.linspace(0, 2, height, dtype=torch.float64)[:, None]  # strips are not alike


def loss_of(logits: Tensor) -> Tensor:
    return (logits * torch.linspace(-1, 2, logits.shape[1], dtype=logits.dtype)).square().sum()


def close(got: Tensor | None, want: Tensor, what: str, tolerance: float = 1e-10) -> None:
    """Equal to `tolerance` of the largest number, or of 1."""
    assert got is not None and got.shape == want.shape, what
    limit = tolerance * max(1.0, want.abs().max().item())
    torch.testing.assert_close(got, want, rtol=0, atol=limit, msg=lambda text: f"{what}: {text}")


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def average_gradients(module: nn.Module, group: dist.ProcessGroup) -> dict[str, Tensor]:
    averaged = gradients(module)
    for gradient in averaged.values():
        dist.all_reduce(gradient, group=group)
        gradient /= dist.get_world_size(group)
    return averaged


def check(
    group: dist.ProcessGroup,
    options: dict[str, Any],
    size: tuple[int, int] = (HEIGHT, WIDTH),
    heights: list[int] | None = None,
    checkpointing: bool = False,
    given: bool = False,
    slots: int | None = None,
) -> None:
    """Outputs and all gradients against those of one process.

    Args:
        options: Of the model.
        size: Of the image, pixels.
        heights: Of the strips, pixels; even ones if None.
        checkpointing: Recompute blocks in the backward pass.
        given: Hand in a memory.
        slots: Of the memory, in use; all if None.
    """
    model = make(**options).eval()
    model.set_memory_len(slots or model.memory_len)
    image, memory = image_of(model, *size).requires_grad_(), None
    if given:
        memory = torch.linspace(-1, 1, 2 * model.memory_len * 16, dtype=torch.float64)
        memory = memory.view(2, -1, 16).requires_grad_()
    features = model.forward_features(image, memory=memory)
    want = model.forward_head(features)
    loss_of(want).backward()
    wanted = gradients(model)
    model.zero_grad()

    rank = dist.get_rank(group)
    if heights is None:
        strip = split_rows(image.detach(), model.patch_embed.patch_size, group)
        start, _ = row_ranges(size[0], model.patch_embed.patch_size[0], dist.get_world_size(group))[rank]
    else:
        start = sum(heights[:rank])
        strip = image.detach()[:, :, start : start + heights[rank]]
    strip = strip.clone().requires_grad_()
    mine = None if memory is None else memory.detach().clone().requires_grad_()
    model.set_grad_checkpointing(checkpointing)
    out = SequenceParallel(model, group).encode(strip, mine)
    columns = -(-size[1] // model.patch_embed.patch_size[1])
    first, last = (r * columns for r in out.rows)
    assert out.grid_size == (-(-size[0] // model.patch_embed.patch_size[0]), columns)
    L = model.memory_len
    close(out.patches, features[:, L + first : L + last], "patches")
    close(out.memory, features[:, :L], "memory")
    close(out.raw_memory, model.encode(image, memory=memory)[1], "raw memory")
    close(out.embedding, model.forward_head(features, pre_logits=True), "embedding")
    logits = out.logits if model.num_classes else out.embedding
    close(logits, want, "logits")

    loss_of(logits).backward()
    got = average_gradients(model, group)
    assert got.keys() == wanted.keys(), got.keys() ^ wanted.keys()
    for name, gradient in got.items():
        close(gradient, wanted[name], name)
    close(strip.grad, image.grad[:, :, start : start + strip.shape[2]], "image")
    if given:
        close(mine.grad, memory.grad, "given memory")


def hang(group: dist.ProcessGroup) -> None:
    time.sleep(600)


def check_forward(group: dist.ProcessGroup) -> None:
    for options in ({}, {"num_classes": 0}):
        model = make(**options).eval()
        parallel, image = SequenceParallel(model, group), image_of(model)
        close(parallel(split_rows(image, 4, group)), model(image), "forward")
        assert parallel.state_dict().keys() == {f"model.{name}" for name in model.state_dict()}


def check_unpooled(group: dist.ProcessGroup) -> None:
    model = make(global_pool="").eval()
    image = image_of(model)
    out = SequenceParallel(model, group).encode(split_rows(image, 4, group))
    assert out.embedding is None and out.logits is None
    close(out.memory, model.forward_features(image)[:, : model.memory_len], "memory")


def check_equal_maxima(group: dist.ProcessGroup) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, 3, (4, 9, 50), generator=generator).double()  # each row's maximum is there many times over
    whole, rank = x.clone().requires_grad_(), dist.get_rank(group)
    loss_of(whole.amax(dim=1)).backward()
    mine = x[:, 3 * rank : 3 * rank + 3].clone().requires_grad_()
    maximum = shared_max(mine, group)
    close(maximum, whole.amax(dim=1), "maximum", 0)
    loss_of(maximum).backward()
    close(mine.grad / 3, whole.grad[:, 3 * rank : 3 * rank + 3], "gradient")


def check_random(group: dist.ProcessGroup) -> None:
    """In training, stochastic depth and the head's dropout are those of the first process's generator, everywhere."""
    model = make(drop_path_rate=0.5, drop_rate=0.5, memory_mlp="own").train()
    image, rank = image_of(model, batch=4), dist.get_rank(group)
    torch.manual_seed(7)
    torch.manual_seed(int(torch.randint(2**62, (1,))))
    want = model(image)
    loss_of(want).backward()
    wanted = gradients(model)
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(7 + rank)
        got = SequenceParallel(model, group)(split_rows(image, 4, group))
        close(got, want, "logits")
        loss_of(got).backward()
        for name, gradient in average_gradients(model, group).items():
            close(gradient, wanted[name], name)
        torch.manual_seed(7 + rank)
        torch.randint(2**62, (1,))
        first = torch.rand(3)
        torch.manual_seed(7 + rank)
        with torch.no_grad():
            SequenceParallel(model, group)(split_rows(image, 4, group))
        assert torch.equal(torch.rand(3), first), "the generator must move on by one number"


def check_dense(group: dist.ProcessGroup) -> None:
    """A loss of the patches, of which each process has its own: their mean counts."""
    model = make().eval()
    image, size = image_of(model, 24, 20), dist.get_world_size(group)
    features = model.forward_features(image)[:, model.memory_len :]
    features.square().mean().backward()
    wanted = gradients(model)
    model.zero_grad()
    SequenceParallel(model, group).encode(split_rows(image, 4, group)).patches.square().mean().backward()
    assert 6 % size == 0  # the mean over the strips is that over the image
    got = average_gradients(model, group)
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        close(gradient, wanted[name], name)


def check_mesh(group: dist.ProcessGroup) -> None:
    """Two images at a time, each on two processes, under DDP, against one process with all of them."""
    model = make(local_mixing="mlp").train()
    image = image_of(model, batch=4)
    loss_of(model(image)).div(4).backward()
    wanted = gradients(model)
    model.zero_grad()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "seq"))
    with pytest.raises(ValueError, match=r"the mesh must have one dimension, such as mesh\['seq'\], got 2"):
        SequenceParallel(model, mesh)
    ddp = DistributedDataParallel(SequenceParallel(model, mesh["seq"]))
    data = mesh.get_local_rank("data")
    mine = image[2 * data : 2 * data + 2]
    for batch in (mine, mine):  # DDP arranges its buckets anew after the first
        model.zero_grad()
        loss_of(ddp(split_rows(batch, model.patch_embed.patch_size, mesh["seq"]))).div(2).backward()
        for name, gradient in gradients(model).items():
            close(gradient, wanted[name], name)


def check_autocast(group: dist.ProcessGroup) -> None:
    """bfloat16 under autocast errs as it does on one process."""
    model = make().float().eval()
    image = image_of(model).float()
    exact = model(image)
    with torch.autocast("cpu", torch.bfloat16):
        one = model(image)
        got = SequenceParallel(model, group)(split_rows(image, 4, group))
        loss_of(got.float()).backward()
    assert (got - exact).norm() < 2 * (one - exact).norm() + 2**-8 * exact.norm()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def check_refusals(group: dist.ProcessGroup) -> None:
    """All processes raise, in one line, and can go on."""
    rank, last = dist.get_rank(group), dist.get_world_size(group) - 1
    model = make()
    parallel = SequenceParallel(model, group)

    def refuses(message: str, call: Any, *arguments: Any) -> None:
        with pytest.raises(ValueError, match=message) as error:
            call(*arguments)
        assert "\n" not in str(error.value)

    good = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    refuses("1 row of patches of 4: too few for 2 processes", split_rows, good[:, :, :4], 4, group)
    refuses("process 1: a strip must have shape", parallel, good[:, :, : 8 if rank == 0 else 0])
    refuses("process 0: a strip must have shape", parallel, good[0] if rank == 0 else good)
    refuses("same batch and width, got 2 of 8 on process 1", parallel, good.repeat(1 + rank, 1, 1, 1))
    refuses("whole patches of 4 rows, got 6 rows on process 0", parallel, good[:, :, : 8 if rank == last else 6])
    memory = torch.zeros(1, 3, 16, dtype=torch.float64)
    message = r"process 1: memory must have shape \[1, 3, 16\], as on all processes, got "
    refuses(message + r"\[1, 2, 16\]", parallel, good, memory[:, : 3 - rank])
    refuses(message + "none", parallel, good, memory if rank == 0 else None)
    refuses(message + "another number of dimensions", parallel, good, memory if rank == 0 else memory[0])
    set_band_checkpointing(model, 2)
    refuses("set band_rows to 0", parallel, good)
    set_band_checkpointing(model, 0)
    refuses("global_pool='' pools nothing: call encode", SequenceParallel(make(global_pool=""), group), good)
    refuses("needs a Luna ViT, got Linear", SequenceParallel, nn.Linear(2, 2), group)
    for mixer in MIXERS:
        if mixer != "luna":
            refuses("needs a memory.*mixer='luna'", SequenceParallel, make(mixer=mixer), group)
    for name in ("pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"):
        dropped = SequenceParallel(make(**{name: 0.1}), group)
        refuses(f"{name}.* must be 0", dropped.train(), good)
        dropped.eval()(good)
    parallel(good)


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("options", EVERY_OPTION, ids=str)
def test_every_option(options, ranks):
    ranks.run(check, 3, options=options)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_number_of_processes(size, ranks):
    ranks.run(check, size, options={"global_pool": "both"})
    ranks.run(check, size, options={"local_mixing": "attn", "global_pool": "map"}, size=(40, 9))


@pytest.mark.parametrize("mixing, stem", [("before", "conv"), ("attn", "patch"), ("mlp", "conv")])
@pytest.mark.parametrize("heights", [(4, 12, 4, 7), (16, 4, 4, 1), (4, 4, 4, 4), (8, 4, 21)])
def test_uneven_strips(mixing, stem, heights, ranks):
    size = (sum(heights), 11)
    ranks.run(check, len(heights), options={"local_mixing": mixing, "stem": stem}, size=size, heights=list(heights))


def test_equal_maxima_on_several_processes_share_the_gradient(ranks):
    ranks.run(check_equal_maxima, 3)


def test_recomputed_blocks(ranks):
    ranks.run(check, 3, options={"local_mixing": "mlp"}, checkpointing=True)


def test_given_memory(ranks):
    ranks.run(check, 3, options={"memory_mlp": "own"}, given=True)


@pytest.mark.parametrize("given", [False, True])
def test_a_shortened_memory(given, ranks):
    ranks.run(check, 3, options={"global_pool": "both"}, given=given, slots=2)


def test_without_pooling_there_are_memory_and_patches(ranks):
    ranks.run(check_unpooled, 2)


def test_forward(ranks):
    ranks.run(check_forward, 2)


def test_random_parts_are_the_same_on_all_processes(ranks):
    ranks.run(check_random, 3)


def test_a_loss_of_the_patches(ranks):
    ranks.run(check_dense, 3)


def test_with_ddp_over_a_mesh(ranks):
    ranks.run(check_mesh, 4)


def test_autocast(ranks):
    ranks.run(check_autocast, 2)


def test_refusals(ranks):
    ranks.run(check_refusals, 2)


def test_without_processes():
    model = make()
    with pytest.raises(ValueError, match="call torch.distributed.init_process_group first"):
        SequenceParallel(model)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_row_ranges_are_whole_patches_and_even(parts):
    for height in range(1, 40):
        rows = -(-height // 4)
        if rows < parts:
            with pytest.raises(ValueError, match=f"has {rows} rows? of patches of 4: too few for {parts} processes"):
                row_ranges(height, 4, parts)
            continue
        ranges = row_ranges(height, 4, parts)
        assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
        assert ranges[-1][1] == height and all(start % 4 == 0 for start, _ in ranges)
        counts = [-(-(stop - start) // 4) for start, stop in ranges]
        assert max(counts) - min(counts) <= 1 and min(counts) >= 1


def test_a_job_that_hangs_fails(tmp_path):
    ranks = Ranks(1, tmp_path)
    with pytest.raises(TimeoutError, match=r"no answer of processes \[0\] in 1 s"):
        ranks.run(hang, 1, timeout=1)
