"""LeJEPA: what its regulariser measures, that processes count together, and that it trains."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from scipy.integrate import quad
from torch import Tensor

from luna_vision.tasks import BestCheckpoint, LeJEPATask
from luna_vision.tasks.lejepa import sigreg, unit_directions

from .conftest import tiny_trainer
from .ranks import run
from .test_feature_distillation import STUDENT, Photos


def pretrain(**arguments) -> LeJEPATask:
    small = {"projector_hidden": 32, "projector_out": 8, "directions": 16, "lr": 1e-2}
    return LeJEPATask(**{"model_name": "test_luna_vit", "model_kwargs": STUDENT, "img_size": 32, **small, **arguments})


def views(**arguments) -> Photos:
    return Photos(views=[(2, 3, 32, 32), (3, 3, 16, 16)], **arguments)


def example() -> tuple[Tensor, Tensor]:
    z = (1.5 * torch.arange(128, dtype=torch.float64).sin()).reshape(2, 16, 4)
    return z, torch.nn.functional.normalize(torch.arange(32, dtype=torch.float64).cos().reshape(4, 8), dim=0)


# ---- SIGReg


def test_sigreg_is_that_of_lightly():
    """Numbers of `lightly.loss.lejepa_loss.SIGReg` 1.6.0 in float64, with these directions."""
    z, directions = example()
    z.requires_grad_()
    value = sigreg(z, directions)
    value.backward()
    assert value.item() == pytest.approx(1.447556369135884, rel=1e-6)
    assert z.grad.abs().sum().item() == pytest.approx(7.971511996304119, rel=1e-6)
    assert z.grad[1, 3, 2].item() == pytest.approx(-0.07785731199241011, rel=1e-6)


def test_sigreg_is_the_integral():
    z, directions = example()
    along = (z @ directions).numpy()  # V, B, S

    def distance(t: float, values: np.ndarray) -> float:
        return abs(np.exp(1j * t * values).mean() - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)

    found = [quad(distance, -3, 3, (along[v, :, s],))[0] for v in range(2) for s in range(8)]
    assert sigreg(z, directions).item() == pytest.approx(16 * np.mean(found), rel=1e-3)


def test_sigreg_tells_gaussians_from_what_is_none():
    directions, count = unit_directions(16, 256, (0, 0)), 4096
    noise = torch.randn(1, count, 16)
    gaussian = sigreg(noise, directions)
    assert gaussian < 2  # of any number of samples, as the statistic is about 1 for Gaussians
    others = {
        "collapsed": torch.zeros(1, count, 16) + 0.1 * noise,
        "wide": 3 * noise,
        "shifted": noise + 1,
        "on a line": noise[..., :1] * torch.ones(16),
    }
    values = {name: float(sigreg(z, directions)) for name, z in others.items()}
    assert all(value > 5 * gaussian for value in values.values()), values
    assert values["collapsed"] > 500 * gaussian


def test_directions_are_of_the_step_alone_and_of_length_one():
    assert torch.equal(unit_directions(8, 5, (3, 4)), unit_directions(8, 5, (3, 4)))
    assert not torch.equal(unit_directions(8, 5, (3, 4)), unit_directions(8, 5, (3, 5)))
    torch.testing.assert_close(unit_directions(8, 5, (0, 0)).norm(dim=0), torch.ones(5))


def _gradient() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, (z, directions) = dist.get_rank(), example()
    own = z[:, rank * 8 : rank * 8 + 8].clone().requires_grad_()
    value = sigreg(own, directions)
    value.backward()
    torch.save({"value": value.detach(), "grad": own.grad}, f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path):
    run(tmp_path, 2, _gradient)
    z, directions = example()
    z.requires_grad_()
    value = sigreg(z, directions)
    value.backward()
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for part in parts:
        torch.testing.assert_close(part["value"], value.detach(), rtol=1e-12, atol=0)
    # the mean over processes, as DDP takes it, of gradients of parameters; each process has those of its own images
    both = torch.cat([part["grad"] for part in parts], dim=1) / 2
    torch.testing.assert_close(both, z.grad, rtol=1e-10, atol=1e-14)


# ---- the task


def test_loss_is_the_formula():
    task = pretrain(sigreg_weight=0.25)
    z = torch.randn(5, 6, 8)
    parts = task.losses(z, 2, step=3)
    centre = (z[0] + z[1]) / 2
    torch.testing.assert_close(parts["agreement_loss"], 0.75 * ((z - centre) ** 2).mean())
    torch.testing.assert_close(parts["sigreg_loss"], 0.25 * sigreg(z, unit_directions(8, 16, (0, 3))))


def test_projections_are_by_view():
    task = pretrain().eval()
    large, small = torch.rand(4, 2, 3, 32, 32), torch.rand(4, 3, 3, 16, 16)
    z, memory, patches = task.projections(large, small)
    assert z.shape == (5, 4, 8) and memory.shape == (4, 4, 16) and patches.shape == (4, 16, 16)
    torch.testing.assert_close(task.projections(large[:, :1])[1], memory)
    torch.testing.assert_close(task.projections(large[:, 1:])[0][0], z[1])
    torch.testing.assert_close(task.projections(small[:, 2:])[0][0], z[4])


def test_it_trains_every_weight(tmp_path):
    task = pretrain()
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    trainer = tiny_trainer(tmp_path, max_epochs=3)
    trainer.validate(task, views(), verbose=False)  # whose state training takes over
    trainer.fit(task, views())
    metrics = trainer.callback_metrics
    shown = ("train_loss", "train_agreement_loss", "train_sigreg_loss", "val_rank", "val_rank_slots")
    assert all(metrics[name].isfinite() for name in shown)
    assert [name for name, p in task.named_parameters() if torch.equal(p, before[name])] == []
    assert metrics["train_loss"] == pytest.approx(
        float(metrics["train_agreement_loss"] + metrics["train_sigreg_loss"]), rel=1e-5
    )


def test_the_best_weights_are_those_of_the_lowest_loss(tmp_path):
    losses, best = [], BestCheckpoint(dirpath=tmp_path)
    seen = LambdaCallback(on_validation_end=lambda trainer, _: losses.append(trainer.callback_metrics["val_loss"]))
    tiny_trainer(tmp_path, max_epochs=4, callbacks=[best, seen], enable_checkpointing=True).fit(
        pretrain(lr=0.5), views()
    )
    assert best.best_model_score == min(losses) < max(losses)


def test_mistakes_are_one_line():
    with pytest.raises(ValueError, match="batch_size must be at least 2"):
        pretrain().check_data(views(batch_size=1), "fit")
    with pytest.raises(ValueError, match="sigreg_weight"):
        pretrain(sigreg_weight=1.0)
    with pytest.raises(ValueError, match="directions"):
        pretrain(directions=0)
