"""Kill trainings, fill the disk, break images, and compare how they end: `python tests/nightly/reliability.py`.

This is no test of pytest: it takes minutes and, for the full disk, the right to mount a file system (--skip-full-disk
skips that part). It starts `train.py` as a user would. Each part must end with the weights of the undisturbed run, bit
for bit, and its log, or with the documented error. Otherwise the exit code is 1. docs/reliability.md is about the
counts, which are written to --out.
"""

import argparse
import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from luna_vision.utils.files import write_json
from luna_vision.utils.record import machine

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
IMAGES, BROKEN = 400, 20  # 5 per cent
LIMIT = 300  # seconds that a run may take


def make_images(folder: Path, broken: int) -> list[str]:
    """Digits as PNG files in class folders, `broken` of the training images cut short, emptied or overwritten."""
    digits = load_digits()
    for split, chosen in (("train", range(IMAGES)), ("val", range(IMAGES, IMAGES + 60))):
        for i in chosen:
            path = folder / split / str(digits.target[i]) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[i] * 15.9).astype(np.uint8)).resize((16, 16)).save(path)
    files = sorted((folder / "train").rglob("*.png"))
    spoiled = random.Random(0).sample(files, broken)
    for i, path in enumerate(spoiled):
        data = path.read_bytes()
        path.write_bytes((data[: len(data) // 2], b"", b"<html>not found</html>")[i % 3])
    return sorted(path.name for path in spoiled)


def write_config(path: Path, images: Path, epochs: int, **data: Any) -> None:
    """configs/debug.yaml with a folder of images, a checkpoint every three steps, and whole epochs."""
    config = yaml.safe_load((ROOT / "configs" / "debug.yaml").read_text(encoding="utf-8"))
    shared = {"img_size": 16, "in_chans": 1, "batch_size": 16, "num_workers": 1, "seed": 0}
    config["data"] = {
        "class_path": "luna_vision.data.ImageFolderDataModule",
        "init_args": {"root": str(images), **shared, **data},
    }
    config["test_after_fit"] = False
    trainer = config["trainer"]
    trainer["max_epochs"] = epochs
    for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"):
        del trainer[name]
    often = {"class_path": "luna_vision.tasks.LastCheckpoint", "init_args": {"every_n_steps": 3}}
    trainer["callbacks+"].append(often)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


def start(folder: Path, config: Path) -> subprocess.Popen:
    """Begin a run, or resume the one that is in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(config)]
    command += ["--resume"] if (folder / "runs").exists() else []
    output = (folder.parent / f"{folder.name}.log").open("w")  # beside the folder, which may be a full disk
    env = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": output, "stderr": subprocess.STDOUT}
    # a job in the background ignores Ctrl-C, and so would what it starts
    return subprocess.Popen(
        command, cwd=folder, env=env, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )


def printed(folder: Path) -> str:
    return (folder.parent / f"{folder.name}.log").read_text(encoding="utf-8", errors="replace")


def run(folder: Path, config: Path) -> int:
    return start(folder, config).wait(LIMIT)


def until_training(process: subprocess.Popen, folder: Path, since: int) -> None:
    """Wait until a row is logged after the time `since` in ns, or the process has ended."""
    rows, end = folder / "runs" / "debug" / "version_0" / "metrics.csv", time.monotonic() + LIMIT
    while process.poll() is None and time.monotonic() < end:
        if rows.is_file() and rows.stat().st_mtime_ns > since:
            return
        time.sleep(0.02)


def result(folder: Path) -> tuple[dict[str, torch.Tensor], dict[tuple, dict[str, str]]]:
    """The weights at the end, and the last row of each step and names of values, without the speed."""
    version = folder / "runs" / "debug" / "version_0"
    with (version / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v and k != "images_per_s"} for row in csv.DictReader(file)]
    logged = {(row["step"], *sorted(row)): row for row in rows}
    return torch.load(version / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"], logged


def difference(folder: Path, reference: Path, killed: bool = False) -> str:
    """How a run differs from the undisturbed one; empty if it does not.

    A run that was `killed` without notice may lack the row that was written right after a checkpoint.
    """
    (weights, rows), (expected, logged) = result(folder), result(reference)
    wrong = [name for name in expected if not torch.equal(weights[name], expected[name])]
    if wrong:
        return f"{len(wrong)} of {len(expected)} weights differ"
    wrong = [key for key, row in rows.items() if logged.get(key) != row]
    lost = [key for key in logged if key not in rows and not killed]
    return f"{len(wrong)} rows of the log differ, {len(lost)} are missing" if wrong or lost else ""


@dataclass
class Length:
    """Seconds of the undisturbed run, and until its training began."""

    all: float
    start: float


def kill(work: Path, config: Path, whole: Path, kills: int, length: Length, seed: int) -> dict[str, Any]:
    """Kill at a random moment of training or (one in five) before it, and resume; compare the runs that end."""
    in_training, killed = 0, False  # whether this run ended without notice
    draw, sent, exits, problems, finished, attempt = random.Random(seed), Counter(), Counter(), [], 0, 0
    folder = work / f"killed{finished}"
    while sent.total() < kills or folder.exists():
        since = time.time_ns()
        process, number = start(folder, config), None
        if sent.total() < kills:
            before = draw.random() < 0.2
            if not before:
                until_training(process, folder, since)
            try:
                process.wait(draw.uniform(0, length.start if before else length.all - length.start))
            except subprocess.TimeoutExpired:
                number = draw.choice(SIGNALS)
                process.send_signal(number)
                sent[number.name] += 1
                in_training += not before
        code = process.wait(LIMIT)
        attempt += 1
        if code == 0:
            problem = difference(folder, whole, killed)
            problems += [f"{folder.name}: {problem}"] if problem else []
            finished, killed = finished + 1, False
            folder = work / f"killed{finished}"
        elif number is None or code not in (CODES[number], -number):  # -number: before Python can handle it
            problems.append(
                f"{folder.name}: exit code {code} after {number and number.name}:\n{printed(folder)[-2000:]}"
            )
            shutil.rmtree(folder)
        else:
            exits[str(code)] += 1
            killed |= code < 0
        print(f"  {sent.total()} of {kills} kills, {finished} runs finished, {len(problems)} problems", flush=True)
    return {
        "kills": dict(sent),
        "kills_in_training": in_training,
        "exit_codes": dict(exits),
        "starts": attempt,
        "finished": finished,
        "problems": problems,
    }


def fill_disk(work: Path, config: Path, whole: Path) -> dict[str, Any]:
    """Train twice on a file system that is full before the end; then enlarge it and resume."""
    needed = sum(path.stat().st_size for path in (whole / "runs").rglob("*") if path.is_file())
    folder, problems, stops, met, kept = work / "full", [], 0, 0, 0
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        return {"problems": [f"not done ({mounted.stderr.decode().strip()}); --skip-full-disk leaves it out"]}
    try:
        for share in (0.3, 0.6, 2.0):  # of what is needed; a checkpoint takes its size again while it is written
            size = int(share * needed) // 1024
            subprocess.run(["mount", "-o", f"remount,size={size}k", str(folder)], check=True)
            code = run(folder, config)
            if share < 1:
                full = code != 0 and "No space left on device" in printed(folder) and "Traceback" not in printed(folder)
                problems += [] if full else [f"{size} KiB: exit code {code}:\n{printed(folder)[-2000:]}"]
                stops += full
                met += bool(re.search(r"cannot write \S+\.ckpt: ", printed(folder)))
                for path in (folder / "runs").rglob("*.ckpt"):
                    torch.load(path, weights_only=True)
                    kept += 1
            elif code:
                problems.append(f"{size} KiB: exit code {code}:\n{printed(folder)[-2000:]}")
            else:
                problem = difference(folder, whole)
                problems += [f"after the disk was full: {problem}"] if problem else []
    finally:
        subprocess.run(["umount", str(folder)])
    problems += [] if met else ["no checkpoint met the full disk"]
    problems += [] if kept else ["no checkpoint was there when the disk was full"]
    counts = {"stops_at_a_full_disk": stops, "of_them_in_a_checkpoint": met, "whole_checkpoints": kept}
    return {"needed_bytes": needed, **counts, "problems": problems}


def break_images(work: Path, epochs: int, kills: int, length: Length) -> dict[str, Any]:
    """Train with 5 per cent broken images, with and without a worker and with kills, and where they are refused."""
    images, problems = work / "broken_images", []
    names = make_images(images, BROKEN)
    skip, alone, strict, share = (work / f"{name}.yaml" for name in ("skip", "alone", "raise", "share"))
    write_config(skip, images, epochs, on_error="skip", max_error_share=0.1)
    write_config(alone, images, epochs, on_error="skip", max_error_share=0.1, num_workers=0)
    write_config(strict, images, epochs, on_error="raise")
    write_config(share, images, epochs, on_error="skip", max_error_share=0.02)
    whole = work / "skipped"
    for folder, config in ((whole, skip), (work / "skipped_without_worker", alone)):
        if code := run(folder, config):
            problems.append(f"{folder.name}: exit code {code}:\n{printed(folder)[-2000:]}")
            return {"broken": len(names), "problems": problems}
        told = [name for name in names if printed(folder).count(name) == 1]
        problems += [] if told == names else [f"{folder.name}: {len(told)} of {len(names)} files are named once"]
    problem = difference(work / "skipped_without_worker", whole)
    problems += [f"without a worker: {problem}"] if problem else []
    killed = kill(work / "broken", skip, whole, kills, length, seed=1)
    errors = {}
    for name, config, words in (("raise", strict, names), ("share", share, ["more than max_error_share=0.02 allows"])):
        code = run(work / name, config)
        lines = [line for line in printed(work / name).splitlines() if any(word in line for word in words)]
        errors[name] = {"exit_code": code, "line": lines[-1].replace(str(work), "...") if lines else None}
        if not code or not lines or "Traceback" in printed(work / name):
            problems.append(f"{name}: exit code {code}:\n{printed(work / name)[-2000:]}")
    return {
        "broken": len(names),
        "of": IMAGES,
        "killed": killed,
        "errors": errors,
        "problems": problems + killed["problems"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="(default: 20)")
    parser.add_argument("--epochs", type=int, default=12, help="of a run (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals (default: 0)")
    parser.add_argument("--skip-full-disk", action="store_true", help="where mounting is not allowed")
    parser.add_argument("--out", type=Path, default=Path("docs/results/reliability.json"))
    args = parser.parse_args()
    since = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        images, config, whole = work / "images", work / "whole.yaml", work / "whole"
        make_images(images, 0)
        write_config(config, images, args.epochs)
        print("the undisturbed run", flush=True)
        started, process = time.monotonic(), start(whole, config)
        until_training(process, whole, since=0)
        began = time.monotonic() - started
        if code := process.wait(LIMIT):
            print(printed(whole), f"exit code {code}", sep="\n", file=sys.stderr)
            return 1
        length = Length(time.monotonic() - started, began)
        parts = {"undisturbed": {"seconds": round(length.all, 1), "problems": []}}
        for name, part in (
            ("kills", lambda: kill(work / "kills", config, whole, args.kills, length, args.seed)),
            ("full_disk", lambda: fill_disk(work, config, whole)),
            ("broken_images", lambda: break_images(work, args.epochs, max(1, args.kills // 4), length)),
        ):
            if name == "full_disk" and args.skip_full_disk:
                parts[name] = {"not_run": "--skip-full-disk", "problems": []}
                continue
            print(name, flush=True)
            parts[name] = part()
            for problem in parts[name]["problems"]:
                print(f"  {problem}", file=sys.stderr)
    about = {"seed": args.seed, "epochs": args.epochs, "minutes": round((time.monotonic() - since) / 60, 1)}
    write_json(args.out, {**about, **parts, **machine()})
    return int(any(part["problems"] for part in parts.values()))


if __name__ == "__main__":
    sys.exit(main())
