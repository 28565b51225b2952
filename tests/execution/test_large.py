"""An image of 2048 x 2048 pixels both ways. How far they are apart goes into the test report (`-rA`, `--junit-xml`)."""

import numpy as np
import timm
import torch

import luna_vision  # noqa: F401  registers the models
from experiments.benchmarks.gigapixel import Mosaic
from luna_vision.execution import encode

from .conftest import normalised

SIDE, BAND = 2048, 7  # which does not divide the 128 rows of patches


@torch.no_grad()
def test_both_ways_at_2048(tmp_path, record_testsuite_property):
    """To 1e-5 of the largest number in float32; and a store in bfloat16, as close as bfloat16 allows."""
    torch.manual_seed(0)
    model = timm.create_model("luna_vit_tiny", num_classes=10, depth=4).eval()
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    image = Mosaic(SIDE)
    features = model.forward_features(normalised(model, image[0:SIDE]))
    L, embedding = model.memory_len, model.forward_head(features, pre_logits=True)[0]
    want = {"embedding": embedding, "logits": model.head(embedding), "memory": features[0, :L], "grid": features[0, L:]}
    for store_dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2**-5)):
        path = tmp_path / f"{store_dtype}.npy"
        got = encode(model, image, store_dtype=store_dtype, band_rows=BAND, grid=path, progress=False)
        for name, wanted in want.items():
            found = torch.from_numpy(np.load(path)).flatten(0, 1) if name == "grid" else getattr(got, name)
            error = ((found - wanted).abs().max() / wanted.abs().max()).item()
            print(f"{SIDE} px, store in {store_dtype}, {name}: {error:.1e} of the largest number")
            record_testsuite_property(f"{SIDE} px, {store_dtype} store, {name}", error)
            assert error < limit, (store_dtype, name)
