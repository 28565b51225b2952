"""Linear layers that were replaced, or are sharded, act where processes share the work, too."""

from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import luna_vision  # noqa: F401  registers the models
from luna_vision.execution.sequence_parallel import SequenceParallel, split_rows

from .ranks import Ranks

OPTIONS = [{"pack_form": "absorbed", "unpack_form": "absorbed"}, {"global_pool": "map"}, {"mixer": "longformer"}]


def make(options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_luna_vit", depth=2, num_classes=5, **options)


def image() -> Tensor:
    return torch.rand(2, 3, 80, 48, generator=torch.Generator().manual_seed(1))


def with_lora(options: dict[str, Any]) -> nn.Module:
    peft = pytest.importorskip("peft")
    targets = ["pack_q", "pack_kv", "unpack_q", "unpack_kv", "attn.proj", "fc1", "fc2", "attn_pool.q", "attn_pool.kv"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(make(options), config).get_base_model()


def strips(group: dist.ProcessGroup, options: dict[str, Any]) -> None:
    model = with_lora(options)
    want = model(image())
    want.square().sum().backward()
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    gradients = {name: p.grad.clone() for name, p in adapters.items()}
    model.zero_grad()

    got = SequenceParallel(model, group)(split_rows(image(), 16, group))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    got.square().sum().backward()
    for name, parameter in adapters.items():
        dist.all_reduce(parameter.grad, group=group)
        torch.testing.assert_close(parameter.grad / dist.get_world_size(group), gradients[name], rtol=1e-3, atol=1e-3)


def sharded(group: dist.ProcessGroup, options: dict[str, Any], how: str) -> None:
    plain, model = make(options), make(options)
    if how == "fully_shard":
        mesh = init_device_mesh("cpu", (dist.get_world_size(group),))
        for module in [m for m in model.modules() if isinstance(m, nn.Linear)]:
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = FullyShardedDataParallel(
            model,
            process_group=group,
            auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
            device_id=torch.device("cpu"),
            use_orig_params=how == "original parameters",
        )
    for net in (plain, model):  # two steps, so that what the first has learned is what the second uses
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        for _ in range(2):
            net(image()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model(image()), plain(image()), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_lora_acts_and_learns_in_strips(ranks: Ranks, options):
    pytest.importorskip("peft")
    ranks.run(strips, 2, options=options)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("how", ["flat parameters", "original parameters", "fully_shard"])
def test_linear_layers_may_be_sharded_one_by_one(ranks: Ranks, how, options):
    ranks.run(sharded, 2, options=options, how=how)
