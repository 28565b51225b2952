"""First contact of luna_vision with a GPU: `python -m experiments.gpu.gpu_check --help`. What to expect: docs/gpu.md.

Correctness comes first, then timings, then steps of training. Each section prints a few lines, and what it has found is
in OUT/gpu_check.json after every result, beside what other sections have found there on the same day and machine. With
`--device cpu` everything that does not need a GPU runs in small.
"""

import contextlib
import copy
import datetime
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled
from torch.utils.data import DataLoader, Dataset

from experiments.benchmarks.cell import Spec, build
from experiments.command import Parser, quiet_lightning
from experiments.gpu.kernels import LAUNCHES, fused_mix, fused_pack, fused_unpack, launches, make, mix, pack, unpack
from luna_vision import functional as LF
from luna_vision.data import GpuDataModule
from luna_vision.execution import encode, set_band_checkpointing
from luna_vision.layers import LunaAttention
from luna_vision.mixers import MIXERS
from luna_vision.tasks import EMA, ClassificationTask, ImagesPerSecond, NonFiniteGuard
from luna_vision.utils.cost import count_macs
from luna_vision.utils.device import allow_tf32, compile_blocks
from luna_vision.utils.files import write_json
from luna_vision.utils.record import machine as describe_machine

__all__ = ["SECTIONS", "Check", "main"]

# of numbers: type of weights and inputs, type of autocast
PRECISIONS = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast to bfloat16": (torch.float32, torch.bfloat16),
    "autocast to float16": (torch.float32, torch.float16),
}
VARIANTS: list[dict[str, Any]] = [
    *({"mixer": mixer} for mixer in MIXERS),
    *({"local_mixing": kind} for kind in ("none", "attn", "mlp")),
    *({"memory_mlp": kind} for kind in ("own", "shared")),
    *({"global_pool": kind} for kind in ("token", "both", "map", "max")),
    {"stem": "conv"},
    {"pos_embed": "learn"},
    {"norm_first": False},
    {"init_values": 0.1},
    {"tie_kv": False},
    {"pack_heads": 1},
    {"memory_len": 32},
    {"memory_len": 32, "pack_form": "absorbed", "unpack_form": "absorbed"},
    {"memory_len": 32, "pack_form": "projected", "unpack_form": "projected"},
    {"patch_size": 8},
    {"use_kernels": True},
    {"use_kernels": True, "tie_kv": False, "init_values": 0.1, "local_mixing": "mlp"},
]


class Check:
    """What was found so far: printed, and in a file after every result.

    Attributes:
        device: "cuda", or "cpu" for a dry run in small.
        small: Whether it is one.
        found: Results by section.
        failed: What is wrong, a line each.
        rate: Operations a second of a matrix product in bfloat16, once it is known.
    """

    def __init__(self, out: Path, device: str = "cuda", seconds: float = 420.0) -> None:
        self.out, self.device, self.small = out, device, device == "cpu"
        self.end, self.begin = time.perf_counter() + seconds, time.perf_counter()
        about = {"date": datetime.date.today().isoformat(), "machine": describe_machine(device)}
        file = out / "gpu_check.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        known = known if {name: known.get(name) for name in about} == about else {}
        self.failed: list[str] = known.pop("failed", [])
        self.found: dict[str, Any] = known | about
        self.rate: float | None = None

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.begin:5.0f} s] {text}", flush=True)

    def note(self, section: str, **values: Any) -> None:
        """Keep a result."""
        self.found.setdefault(section, []).append(values)
        write_json(self.out / "gpu_check.json", {**self.found, "failed": self.failed})

    def begin_section(self, name: str) -> None:
        """Forget what an earlier check on this machine, today, has found in a section."""
        if name != "machine":  # which describes it
            self.found.pop(name, None)
        self.failed = [line for line in self.failed if not line.startswith(f"{name}: ")]
        self.say(f"{name}: {SECTIONS[name].__doc__}")

    def fail(self, text: str) -> None:
        self.failed.append(text)
        self.say(f"  FAIL {text}")

    def judge(self, section: str, name: str, measure: Callable[[], dict[str, float]], limit: float) -> None:
        """Keep the errors that are measured, and what is wrong where one is above the limit, or no number."""
        try:
            errors = measure()
        except Exception as error:  # what does not run must not hide what does not come out right
            self.fail(f"{section}: {name}: {first_line(error)}")
            self.note(section, name=name, ok=False, error=first_line(error))
            return
        wrong = {key: error for key, error in errors.items() if not error <= limit}
        if wrong:
            self.fail(f"{section}: {name}: {', '.join(f'{k} {v:.1e}' for k, v in wrong.items())} above {limit:g}")
        self.note(section, name=name, ok=not wrong, limit=limit, **errors)

    def late(self, seconds: float) -> bool:
        """Whether less time than this is left."""
        return self.end - time.perf_counter() < seconds

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def timed(self, step: Callable[[], Any], seconds: float = 0.4) -> float:
        """Median milliseconds of a step, after three to warm up, by the device's own clock where it has one."""
        if self.small:
            started = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - started)
        for _ in range(3):
            step()
        times, started = [], time.perf_counter()
        while len(times) < 5 or (time.perf_counter() - started < seconds and len(times) < 200):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            step()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last))
        return statistics.median(times)


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, which is on the CPU."""
    expected = expected.detach().double()
    return float((found.detach().cpu().double() - expected).norm() / expected.norm().clamp(min=1e-30))


def distances(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Those of all that is expected."""
    return {name: distance(found[name], expected[name]) for name in expected}


def first_line(error: BaseException) -> str:
    """The kind of an error, and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


# ---- correctness


def machine(check: Check) -> None:
    """How fast memory and matrix products are here, and what the backends are set to."""
    size, side = (2**20, 64) if check.small else (2**30, 8192)
    a, b = (torch.empty(size, dtype=torch.uint8, device=check.device) for _ in range(2))
    values: dict[str, Any] = {"copy_TB_s": 2 * size / check.timed(lambda: b.copy_(a)) / 1e9}
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(side, side, device=check.device, dtype=dtype)
        values[f"{str(dtype)[6:]}_TFLOP_s"] = 2 * side**3 / check.timed(lambda x=x: x @ x) / 1e9
    check.rate = 1e12 * values["bfloat16_TFLOP_s"]
    if check.device == "cuda":
        matmul = torch.backends.cuda.matmul
        values |= {"cudnn": torch.backends.cudnn.version(), "tf32_matmul": matmul.allow_tf32}
        values |= {"tf32_cudnn": torch.backends.cudnn.allow_tf32}
        values |= {"bf16_reduced": matmul.allow_bf16_reduced_precision_reduction}
    check.found["machine_speed"] = []
    check.note("machine_speed", **values)
    check.say("  " + ", ".join(f"{name} {value}" for name, value in values.items()))


def layer(check: Check) -> None:
    """Luna attention in all forms, masks and types: values and gradients against float64 on the CPU."""
    limits = dict(zip(PRECISIONS, (1e-10, 1e-4, 0.06, 0.01, 0.06, 0.01), strict=True))
    C, H, slots, B, N = 96, 3, 8, 3, 41 if check.small else 341
    worst: dict[str, float] = {}
    for tied in (True, False):
        for pack_heads in (None, 1):
            for masked in (False, True):
                torch.manual_seed(0)
                shape = {"dim": C, "num_heads": H, "pack_heads": pack_heads, "tie_kv": tied, "memory_len": slots}
                exact = LunaAttention(**shape, pack_form="projected", unpack_form="projected")
                for p in exact.parameters():
                    nn.init.normal_(p, std=1.5 / C**0.5 if p.dim() > 1 else 0.2)
                tokens = torch.randn(B, N, C), torch.randn(B, slots, C)
                masks = [torch.rand(B, n) < 0.7 for n in (N, slots)] if masked else []
                for mask in masks:
                    mask[:, 0] = True
                given = [torch.randn_like(x) for x in tokens]
                want = _values_and_gradients(exact, tokens, masks, given, "cpu", *PRECISIONS["float64"])
                for pack_form in LF.FORMS[1:]:
                    for unpack_form in LF.FORMS[1:]:
                        other = LunaAttention(**shape, pack_form=pack_form, unpack_form=unpack_form)
                        other.load_state_dict(exact.state_dict())
                        for precision, limit in limits.items():
                            of = f"tied {tied}, pack_heads {pack_heads}, masked {masked}, {pack_form}/{unpack_form}"
                            here = other, tokens, masks, given, check.device, *PRECISIONS[precision]

                            def errors(here=here, want=want, precision=precision) -> dict[str, float]:
                                found = distances(_values_and_gradients(*here), want)
                                worst[precision] = max(worst.get(precision, 0.0), *found.values())
                                return found

                            check.judge("layer", f"{of}, {precision}", errors, limit)
    for precision, error in worst.items():
        check.say(f"  {precision:22s} worst {error:.1e}, limit {limits[precision]:g}")


def _values_and_gradients(
    layer: LunaAttention,
    tokens: tuple[Tensor, Tensor],
    masks: list[Tensor],
    given: list[Tensor],
    device: str,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
) -> dict[str, Tensor]:
    leaves = [x.to(device, dtype).requires_grad_() for x in tokens]
    layer = copy.deepcopy(layer).to(device, dtype)
    with torch.autocast(device, autocast, enabled=autocast is not None):
        y, packed = layer(*leaves, *(mask.to(device) for mask in masks))
    loss = sum((x.double() * g.to(device)).sum() for x, g in zip((y, packed), given, strict=True))
    names = ["x", "memory", *(name for name, _ in layer.named_parameters())]
    gradients = torch.autograd.grad(loss, [*leaves, *layer.parameters()])
    return {"y": y, "packed": packed, **{f"d_{name}": g for name, g in zip(names, gradients, strict=True)}}


def models(check: Check) -> None:
    """Every mixer and option, with and without a mask: values and gradients against float64 on the CPU."""
    limits = {"float64": 1e-9, "float32": 5e-3, "autocast to bfloat16": 0.2, "bfloat16": 0.3}
    done = 0
    for arguments in VARIANTS[:: 5 if check.small else 1]:
        if arguments.get("mixer") in ("performer", "rfa"):
            arguments = {**arguments, "mixer_args": {"redraw_interval": None}}
        for masked in (False, True):
            name = f"{arguments}, masked {masked}"
            torch.manual_seed(0)
            model = timm.create_model("test_luna_vit", num_classes=7, depth=2, **arguments).double().train()
            x, patch = torch.randn(2, 3, 83, 64, dtype=torch.float64), arguments.get("patch_size", 16)
            valid = torch.ones(2, -(-83 // patch), 64 // patch, dtype=torch.bool)
            valid[1, :, -1] = False
            mask = {"patch_valid": valid.flatten(1)} if masked else {}
            want = _logits_and_gradients(model, x, mask, "cpu", *PRECISIONS["float64"])
            for precision, limit in limits.items():
                here = model, x, mask, check.device, *PRECISIONS[precision]
                if arguments.get("mixer") == "routing" and precision != "float64":
                    limit *= 20  # near the border of a cluster rounding decides

                def errors(here=here, want=want, limit=limit) -> dict[str, float]:
                    found = _logits_and_gradients(*here)
                    wrong = _wrong_parameters(here[0], found["gradients"], want["gradients"], limit)
                    return distances(found, want) | wrong

                check.judge("models", f"{name}, {precision}", errors, limit)
                done += 1
        if check.late(0):
            break
    check.say(f"  {done} comparisons")


def _logits_and_gradients(
    model: nn.Module,
    x: Tensor,
    mask: dict[str, Tensor],
    device: str,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
) -> dict[str, Tensor]:
    model = copy.deepcopy(model).to(device, dtype)
    with torch.autocast(device, autocast, enabled=autocast is not None):
        y = model(x.to(device, dtype), **{name: m.to(device) for name, m in mask.items()})
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(y.double().square().sum(), parameters, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return {"logits": y, "gradients": torch.cat([g.flatten() for g in flat])}


def _wrong_parameters(model: nn.Module, found: Tensor, expected: Tensor, limit: float) -> dict[str, float]:
    """Parameters whose gradients are the larger part of an error above a limit, and its part, of all gradients."""
    sizes = [p.numel() for p in model.parameters()]
    apart = zip(found.detach().cpu().double().split(sizes), expected.double().split(sizes), strict=True)
    errors = [float((a - b).norm() / expected.double().norm()) for a, b in apart]
    names = [f"d_{name}" for name, _ in model.named_parameters()]
    return {name: error for name, error in zip(names, errors, strict=True) if not error <= 0.5 * limit}


def execution(check: Check) -> None:
    """In pieces or at once is the same: tiles of a pack, bands, gradient checkpointing, streaming; float16's range."""
    torch.manual_seed(0)
    device, plain = check.device, PRECISIONS["float32"]

    def tiles(form: str) -> dict[str, float]:
        attention = LunaAttention(96, 3, pack_form=form).to(device)
        x, memory = torch.randn(2, 341, 96, device=device), torch.randn(2, 8, 96, device=device)
        query = attention.pack_query(memory)
        states = [attention.pack_tile(tile, query) for tile in x.split(100, dim=1)]
        whole = attention.pack(x, memory).cpu()
        return {"packed": distance(functools.reduce(LF.PackState.merge, states).finish(), whole)}

    for form in LF.FORMS[1:]:
        check.judge("execution", f"a pack in tiles, {form}", lambda form=form: tiles(form), 1e-4)

    model = timm.create_model("test_luna_vit", num_classes=7).train()
    x = torch.randn(2, 3, 96, 80)
    want = _logits_and_gradients(model, x, {}, "cpu", *plain)

    def in_pieces(change: Callable[[nn.Module], None]) -> dict[str, float]:
        other = copy.deepcopy(model)
        change(other)
        return distances(_logits_and_gradients(other, x, {}, device, *plain), want)

    check.judge("execution", "bands", lambda: in_pieces(lambda m: set_band_checkpointing(m, 2)), 5e-3)
    check.judge("execution", "checkpointing", lambda: in_pieces(lambda m: m.set_grad_checkpointing(True)), 5e-3)

    @torch.no_grad()
    def streamed() -> dict[str, float]:
        image, ours = torch.rand(170, 210, 3), copy.deepcopy(model).to(device).eval()
        expected = ours(image.permute(2, 0, 1)[None].to(device))[0].cpu()
        found = encode(ours, image.numpy(), mean=0.0, std=1.0, band_rows=3, progress=False)
        return {"logits": distance(found.logits, expected)}

    @torch.no_grad()
    def large() -> dict[str, float]:
        ours = copy.deepcopy(model).to(device).half().eval()
        for p in ours.parameters():
            p.mul_(30)
        return {"not finite": float((~ours((50 * x).to(device).half()).isfinite()).sum())}

    def scaled() -> dict[str, float]:
        ours, scaler = copy.deepcopy(model).to(device), torch.amp.GradScaler(device)
        optimizer = torch.optim.AdamW(ours.parameters(), 1e-3, fused=True)
        for _ in range(4):
            with torch.autocast(device, torch.float16):
                logits = ours(x.to(device)).float()
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(logits, torch.zeros(2, dtype=torch.long, device=device))).backward()
            scaler.step(optimizer)
            scaler.update()
        return {"not finite": float(sum((~p.isfinite()).sum() for p in ours.parameters()))}

    check.judge("execution", "streaming", streamed, 5e-3)
    check.judge("execution", "float16 of large numbers", large, 0.0)
    check.judge("execution", "steps in float16 with a scaler", scaled, 0.0)
    check.say(f"  {len(check.found['execution'])} comparisons")


def waits(check: Check) -> None:
    """How often a step of each mixer waits for the device, and whether its forward pass is captured as a CUDA graph."""
    if check.device != "cuda":
        check.note("waits", skipped="needs a GPU")
        check.say("  needs a GPU")
        return
    for mixer, kernels in [*((mixer, False) for mixer in MIXERS), ("luna", True)]:
        for masked in (False, True):
            arguments = {"mixer": mixer, "use_kernels": kernels, "drop_path_rate": 0.1}
            model = timm.create_model("test_luna_vit", **arguments).cuda().train()
            x = torch.randn(2, 3, 96, 96, device="cuda")
            mask = {"patch_valid": torch.ones(2, 36, dtype=torch.bool, device="cuda")} if masked else {}
            model(x, **mask).sum().backward()
            torch.cuda.synchronize()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    model(x, **mask).sum().backward()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            count = sum("synchroniz" in str(warning.message) for warning in caught)
            captured = _captured(model.eval(), x, mask)
            check.note("waits", mixer=mixer, kernels=kernels, masked=masked, waits=count, graph=captured)
            check.say(f"  {mixer:12s}{' kernels' * kernels} masked {masked!s:5s} waits {count:3d}, graph: {captured}")


@torch.no_grad()
def _captured(model: nn.Module, x: Tensor, mask: dict[str, Tensor]) -> str:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        with torch.cuda.stream(stream):
            model(x, **mask)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = model(x, **mask)
        graph.replay()
        torch.cuda.synchronize()
        return "yes" if distance(y, model(x, **mask).cpu()) < 1e-3 else "wrong values"
    except RuntimeError as error:
        torch.cuda.synchronize()
        return f"no, {first_line(error)[:80]}"


def kernels(check: Check) -> None:
    """The fused kernels against their formulas, values and gradients; on a CPU in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        check.note("kernels", skipped="triton is not installed")
        check.say("  triton is not installed")
        return
    # bfloat16, which the interpreter multiplies as integers, needs a GPU
    limits = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
    jobs = [("float32", 64, 0)]
    if not check.small:
        jobs = [(dtype, width, 0) for dtype in limits for width in (128, 192, 384)]
        # side by side with these, so that `kernel_speed` finds them compiled
        jobs += [("bfloat16", width, 1 + i) for width, of in LAUNCHES.items() for i in range(len(of))]
    running = []
    for dtype, width, index in jobs:
        words = [sys.executable, "-m", "experiments.gpu.kernels", "--device", check.device, "--dtype", dtype]
        words += ["--width", str(width), "--launches", str(index)]
        # the interpreter must be asked for before triton is imported, which torch does
        environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if check.small else {}), "OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    end = time.perf_counter() + (300 if check.small else 90)
    for (dtype, width, index), process in zip(jobs, running, strict=True):
        name = f"{dtype}, width {width}" + f", launches {index}" * bool(index)
        try:
            out, said = process.communicate(timeout=max(1.0, end - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            out, said = process.communicate()
            said += "\nout of time"
        rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        if process.returncode:
            rows.append({"error": " ".join(said.splitlines()[-1:])[:300]})
        for row in rows:
            if "error" in row:
                check.fail(f"kernels: {name}: {row}")
                check.note("kernels", dtype=dtype, width=width, launches=index, ok=False, **row)
                continue
            shape = {key: row.pop(key) for key in ("B", "N", "slots", "masked")}
            check.judge("kernels", f"{name}, {shape}", functools.partial(dict, row), limits[dtype])
        worst = max((v for row in rows for v in row.values() if isinstance(v, float)), default=float("nan"))
        check.say(f"  {name}: worst {worst:.1e}, limit {limits[dtype]:g}")


# ---- timings


CACHE = 150_000_000  # bytes, thrice the cache of an H100


def kernel_speed(check: Check) -> None:
    """The fused kernels beside the operations that they replace, and the time that memory alone takes: milliseconds in
    a CUDA graph, each time with patches that are not in the cache."""
    if check.device != "cuda" or importlib.util.find_spec("triton") is None:
        check.note("kernel_speed", skipped="needs a GPU and triton")
        check.say("  needs a GPU and triton")
        return
    began = time.perf_counter()
    shapes = ((256, 196, 8, 384), (12, 4096, 8, 384), (1, 16384, 8, 384), (4, 16384, 16, 384), (512, 64, 8, 128))
    ways = {"eager": (pack, unpack, mix), "kernel": (fused_pack, fused_unpack, fused_mix)}
    broken = {(row["width"], row["launches"]) for row in check.found.get("kernels", []) if "error" in row}
    for B, N, slots, C in shapes:
        for way, functions in ways.items():
            for index in range(1 + len(LAUNCHES[C]) if way == "kernel" and slots == 8 else 1):
                if way == "kernel" and (C, index) in broken:
                    continue  # what breaks the device would end all that follows
                with launches(C, index) if way == "kernel" else contextlib.nullcontext():
                    _kernel_speed(check, (B, N, slots, C), f"{way} {index}" if index else way, *functions)
        if time.perf_counter() - began > 40:
            check.say("  out of time")
            return
    for B, N, slots, C in shapes[:2]:  # last, for compiling takes seconds
        compiled = [torch.compile(function, dynamic=False) for function in ways["eager"]]
        _kernel_speed(check, (B, N, slots, C), "compiled", *compiled)
        if time.perf_counter() - began > 40:
            check.say("  out of time")
            return


def _kernel_speed(
    check: Check, shape: tuple[int, int, int, int], way: str, pack: Callable, unpack: Callable, mix: Callable
) -> None:
    """A row of milliseconds: of pack, unpack and local mixing, forward, and with the backward pass."""
    B, N, slots, C = shape
    given = make(B, N, C, slots, "cuda", torch.bfloat16)
    numbers = given["x"].numel()
    copies = [given["x"].detach().clone().requires_grad_() for _ in range(max(2, CACHE // (2 * numbers)))]
    to_unpack = [given[name] for name in ("k", "shift", "v", "w", "b")]
    of = {
        "pack": (pack, [given["m"]]),
        "unpack": (functools.partial(unpack, slots=slots), to_unpack),
        "mix": (mix, [given["conv"], given["b"]]),
    }
    # read x; read x, write two; read x, write y; read x and dz, write dx; read x, dy and dh, write dx; read dy, write
    # dx, and read x and dy for the weights: at 3 TB/s
    passes = {"pack": 1, "unpack": 3, "mix": 2, "pack_both": 3, "unpack_both": 7, "mix_both": 6}
    row: dict[str, Any] = {"B": B, "N": N, "slots": slots, "width": C, "way": way}
    for name, count in passes.items():
        kind, _, both = name.partition("_")
        function, tensors = of[kind]
        dy = torch.randn_like(given["m"] if kind == "pack" else given["x"])

        def step(both=both, tensors=tensors, function=function, dy=dy) -> None:
            for x in copies:
                if not both:
                    with torch.no_grad():
                        function(x, *tensors)
                    continue
                y = function(x, *tensors)
                y = y if isinstance(y, tuple) else (y,)
                torch.autograd.grad(y, [x, *tensors], [dy] * len(y))

        try:
            row[name] = check.timed(_graph(step), 0.05) / len(copies)
        except Exception as error:  # one that does not run must not hide the others
            row[f"{name}_error"] = first_line(error)[:200]
        row[f"{name}_memory"] = 2 * count * numbers / 3e9
    check.note("kernel_speed", **row)
    check.say("  " + ", ".join(f"{n} {v:.4f}" if isinstance(v, float) else f"{n} {v}" for n, v in row.items()))


def _graph(step: Callable[[], Any]) -> Callable[[], Any]:
    """The same step as a CUDA graph."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


MODELS = (
    "luna_vit_small,use_kernels=False",
    "luna_vit_small,use_kernels=True",
    "vit_small_patch16_224",
    "luna_vit_small,mixer=identity",
    "xcit_small_12_p16_224",
    "efficientvit_b2",
    "convnext_tiny",
    "luna_vit_small,memory_len=32",
)
WHOLE = ("efficientvit_b2", "convnext_tiny")  # are compiled as a whole, for which a second size leaves no time
BATCHES = {224: 256, 384: 96, 512: 48, 1024: 12, 2048: 3, 4096: 1}  # of images that fill the card


def speed(check: Check) -> None:
    """Images a second and peak memory of models, and their share of the rate of matrix products: inference in bfloat16,
    eager, compiled and (one image) as a CUDA graph; training under autocast."""
    batches, names = BATCHES, MODELS
    if check.small:
        shells = (f"test_luna_vit,depth=1,use_kernels={use}" for use in (False, True))
        batches, names = {160: 2}, (*shells, "test_vit,depth=1")
    ways = [("inference", "eager"), ("inference", "compiled"), ("training", "eager"), ("inference", "graph")]
    ways.append(("training", "compiled"))
    rare = (384, 4096)
    # what says most comes first: the first four models, at the usual sides
    plan = [(side, way, names[:4]) for way in ways for side in batches if side not in rare]
    plan += [(side, way, names[4:]) for way in ways for side in batches if side not in rare]
    plan += [(side, way, names) for way in ways for side in batches if side in rare]
    for side, (mode, execution), models in plan:
        said = []
        for name in models:
            if check.late(45):
                check.say("  out of time")
                return
            if mode == "training" and (side >= 4096 or (side >= 2048 and name.startswith("vit_"))):
                continue  # minutes
            if execution == "compiled" and name in WHOLE and side > 224:
                continue
            row = {"model": name, "side": side, "mode": mode, "execution": execution}
            try:
                batch = 1 if execution == "graph" else batches[side]
                row |= _measure(check, Spec.parse(name), side, batch, mode == "training", execution)
                said.append(f"{name} {row['images_s']:.0f}/s")
            except RuntimeError as error:  # out of memory, or of what a compiler can do
                row["error"] = first_line(error)
                said.append(f"{name} {type(error).__name__}")
            check.note("speed", **row)
        check.say(f"  {side} px, {mode}, {execution}: {', '.join(said)}")


def _measure(
    check: Check, spec: Spec, side: int, batch: int, training: bool, execution: str
) -> dict[str, float | None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    if check.device == "cuda":
        torch.cuda.empty_cache()
    model, device = build(spec, side, side).to(check.device).train(training), check.device
    B = max(1, batch // 2) if training else batch
    x, targets = torch.randn(B, 3, side, side, device=device), torch.randint(1000, (B,), device=device)
    if not training:
        model, x = model.bfloat16(), x.bfloat16()
    if execution == "compiled":
        compile_blocks(model, dynamic=False, backend="eager" if check.small else "inductor")

    def step() -> None:
        if not training:
            with torch.inference_mode():
                model(x)
            return
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), targets)
        loss.backward()
        model.zero_grad(set_to_none=True)

    step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        if execution == "graph":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay
    ms = check.timed(step, 0.3)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    with torch.device("meta"):
        meta = build(spec, side, side)
    macs = count_macs(meta, side, side)
    flops = 2 * macs * B / ms * 1e3 * (3 if training else 1)  # a backward pass does twice the work
    share = flops / check.rate if check.rate else None
    return {"batch": B, "ms": ms, "images_s": 1e3 * B / ms, "peak_GB": peak, "share_of_gemm": share}


def profile(check: Check) -> None:
    """Kernels of a forward pass in bfloat16, and their time; the table goes to OUT/profile_SIDE_BATCH.txt."""
    cuda = check.device == "cuda"
    for side, batch in ((224, 256), (1024, 16), (224, 1)) if cuda else ((64, 1),):
        model = timm.create_model("luna_vit_small" if cuda else "test_luna_vit").to(check.device).bfloat16().eval()
        x = torch.randn(batch, 3, side, side, device=check.device).bfloat16()
        with torch.inference_mode():
            model(x)
            check.sync()
            activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
            with profiled(activities=activities) as found:
                model(x)
                check.sync()
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)
        (check.out / f"profile_{side}_{batch}.txt").write_text(table, encoding="utf-8")
        ran = [event for event in found.events() if str(event.device_type).endswith("CUDA")]
        took = sum(event.time_range.elapsed_us() for event in ran)
        check.note("profile", side=side, batch=batch, kernels=len(ran), kernel_us=took)
        check.say(f"  {side} px, batch {batch}: {len(ran)} kernels, {took:.0f} us")


# ---- training


class _OneImage(Dataset):
    """The same image again and again: what is timed is the step, and not the data."""

    def __init__(self, side: int, length: int) -> None:
        self.image, self.length = torch.randn(3, side, side), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.image, index % 1000


class _Clock(L.Callback):
    """Milliseconds of a step, without the first ones."""

    def __init__(self, check: Check, skipped: int) -> None:
        self.check, self.skipped, self.steps = check, skipped, 0

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.skipped:
            self.check.sync()
            self.since = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.check.sync()
        self.ms = 1e3 * (time.perf_counter() - self.since) / (trainer.global_step - self.skipped)


@quiet_lightning()
def training(check: Check) -> None:
    """A step of the real training loop: bare, with the callbacks of the configs, and with data on the device."""
    name, side, batch, steps, skipped = "luna_vit_small", 224, 64, 50, 10
    if check.small:
        name, side, batch, steps, skipped = "test_luna_vit", 64, 2, 3, 1
    workers = 0 if check.small else 4
    loader = DataLoader(_OneImage(side, batch * (steps + 10)), batch, num_workers=workers, pin_memory=bool(workers))
    usual = [NonFiniteGuard(), EMA(0.999), ImagesPerSecond(), L.callbacks.RichProgressBar()]
    _time_steps(check, "bare", ClassificationTask(name, 1000), loader, [], steps, skipped)
    _time_steps(check, "guard", ClassificationTask(name, 1000), loader, [NonFiniteGuard()], steps, skipped)
    _time_steps(check, "guard, EMA, rate, Rich bar", ClassificationTask(name, 1000), loader, usual, steps, skipped)
    if not check.small:
        name, side, batch, steps = "luna_vit_nano_patch8", 64, 512, 100
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        images = rng.integers(0, 256, (batch * (steps + 10), side, side, 3), np.uint8)
        np.savez(file := Path(folder, "data.npz"), x_train=images, y_train=np.arange(len(images)) % 20)
        data = GpuDataModule(str(file), img_size=side, batch_size=batch, val_fraction=0.0, crop_pct=None)
        task = ClassificationTask(name, 20, compile=False if check.small else "blocks")
        usual = [NonFiniteGuard(), EMA(0.999), ImagesPerSecond()]
        _time_steps(check, "images on the device, compiled blocks", task, data, usual, steps, skipped)


def _time_steps(
    check: Check,
    what: str,
    task: ClassificationTask,
    data: DataLoader | GpuDataModule,
    callbacks: list[L.Callback],
    steps: int,
    skipped: int,
) -> None:
    clock = _Clock(check, skipped)
    trainer = L.Trainer(
        accelerator="gpu" if check.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=steps,
        callbacks=[clock, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar="Rich" in what,
        default_root_dir=check.out,
        num_sanity_val_steps=0,
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer.fit(task, data)
    name = task.hparams.model_name
    check.note("training", what=what, model=name, batch=data.batch_size, ms_per_step=clock.ms)
    check.say(f"  {what}: {clock.ms:.1f} ms a step, {name}, batch {data.batch_size}")


SECTIONS: dict[str, Callable[[Check], None]] = {
    section.__name__: section
    for section in (machine, layer, models, execution, waits, kernels, kernel_speed, speed, profile, training)
}


def main(argv: list[str] | None = None) -> int:
    """Run the sections; returns the exit code: 1 if something is wrong."""
    parser = Parser(prog="python -m experiments.gpu.gpu_check", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is a dry run in small")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="in this order")
    parser.add_argument("--seconds", type=float, default=420.0, help="after which no section begins")
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpu"), help="folder of the results")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu is a dry run")
    warnings.filterwarnings("ignore")
    allow_tf32(False)  # float32 is compared with float64, and the rest is in half precision
    check = Check(args.out, args.device, args.seconds)
    for name in args.sections:
        if check.late(20):
            check.say(f"{name}: left out, no time")
            continue
        check.begin_section(name)
        try:
            SECTIONS[name](check)
        except Exception as error:  # a section that breaks must not cost the others their time on the GPU
            traceback.print_exc()
            check.fail(f"{name}: {first_line(error)}")
    print(f"\n{len(check.failed)} failed", *(f"  {line}" for line in check.failed[:25]), sep="\n")
    return int(bool(check.failed))


if __name__ == "__main__":
    sys.exit(main())
