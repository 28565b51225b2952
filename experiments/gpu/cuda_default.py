"""A pytest plug-in, `-p experiments.gpu.cuda_default`: what tests make or read without naming a device is on the GPU.

Tests of what only a CPU does are skipped with the reason, and the summary says which failures are a test's own: tensors
of two devices meet, which a layer cannot cause here.
"""

import functools
import os

import pytest
import safetensors.torch
import torch

DEVICE = os.environ.get("DEVICE", "cuda")
MODE = "a default device is a mode, in which dynamo does not trace Tensor.unflatten"
CPU_ONLY = {
    "test_half_precision_compiles_as_one_graph": MODE,
    "test_fully_masked_row_is_finite_where_it_cannot_be_checked": MODE,
    "test_a_compiled_block_has_one_graph": MODE,
    "test_fully_masked_row_is_finite_in_a_block_which_leaves_the_check_to_the_model": "a GPU's mask is not looked at",
    "test_what_does_not_fit_is_said": "a GPU's mask is not looked at",
    "test_absorbed_dropout_equals_the_formula_with_the_same_weights_dropped": "a GPU's scores lie in another order",
    "test_autocast_gives_the_same_type_in_both_forms": "autocast of a CPU",
    "test_a_half_precision_model_gives_what_float32_gives": "autocast of a CPU",
    "test_autocast_folds_in_its_own_type_and_sums_in_float32": "autocast of a CPU",
}
OWN = ("on the same device", "device type for generator", "can't convert cuda")


class Generator(torch.Generator):
    """On the default device."""

    def __new__(cls, device: str = DEVICE) -> "Generator":
        return super().__new__(cls, device)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_default_device(DEVICE)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.Generator = Generator
    safetensors.torch.load_file = functools.partial(safetensors.torch.load_file, device=DEVICE)
    from_numpy = torch.from_numpy
    torch.from_numpy = lambda array: from_numpy(array).to(DEVICE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = CPU_ONLY.get(getattr(item, "originalname", ""))
        if reason and DEVICE != "cpu":
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    failed = terminalreporter.stats.get("failed", [])
    own = [report for report in failed if any(text in report.longreprtext for text in OWN)]
    terminalreporter.section("on the GPU")
    for report in own:
        terminalreporter.write_line(f"the test's own: {report.nodeid}")
    for report in failed:
        if report not in own:
            terminalreporter.write_line(f"to look at: {report.nodeid}")
    terminalreporter.write_line(f"{len(failed)} failed, {len(own)} by the test's own mixing of devices")
