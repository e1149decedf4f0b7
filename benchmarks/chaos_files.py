"""Disks that fill up and files that are damaged: ``python -m benchmarks.chaos --full-disk 200``, ``--damage 100``.

``--full-disk N``: runs on a file system in memory of 2 MB (mounting it needs root), of which a random part is in use,
save every step until N checkpoints have been begun. Each run must end with exit code 0, or 2 with one line; the
checkpoints that are left must be readable, and nothing half written may be left.

``--damage N``: N times for each kind of file (config.json, result.json, metrics.h5, a part of a checkpoint, a data
file), bytes are flipped, overwritten or cut off, and a command reads the file. It must end with exit code 0 and the
result of the undamaged file, or 2 with one line; a traceback, another code or another result is a failure. (A report
may differ in what the damaged file says.)
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos_runs import ROOT, finished
from benchmarks.damage import damaged
from mpitrain.errors import UsageError
from mpitrain.records import checkpoint

DISK_BYTES = 2 << 20
LIMIT_SECONDS = 120.0
KINDS = ("config.json", "result.json", "metrics.h5", "checkpoint", "data")
TINY = ["--data", "synthetic:n=200,shape=16,classes=4", "--model", "mlp:hidden=16", "--batch-size", "16", "--quiet"]


@dataclass(frozen=True)
class Case:
    """One command on a disk that was full, or with a file that was damaged.

    Attributes:
        kind: ``disk`` or the kind of the file.
        n: The number of checkpoints that it has begun, or 1.
        passed: Whether it did what it should.
        outcome: ``finished``, ``refused`` or why it failed.
    """

    kind: str
    n: int
    passed: bool
    outcome: str


def mpitrain(*arguments: str) -> tuple[str, int]:
    """Run a command of mpitrain on one rank."""
    return finished([sys.executable, "-m", "mpitrain", *arguments], LIMIT_SECONDS)


def verdict(output: str, code: int) -> str:
    """Return why output and exit code are wrong whatever was damaged; nothing if they are right."""
    lines = [line for line in output.splitlines() if line.startswith("mpitrain: error")]
    if "Traceback" in output or code not in (0, 2):
        return f"exit code {code}\n{output[-2000:]}"
    if code == 2 and len(lines) != 1:
        return f"exit code 2 with {len(lines)} lines\n{output[-2000:]}"
    return ""


def fill_disk(rng: random.Random) -> Case:
    """Train on a disk that fills up."""
    disk = Path(tempfile.mkdtemp(prefix="mpitrain-chaos-"))
    if os.geteuid() != 0 or finished(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)])[1]:
        disk.rmdir()
        raise UsageError("--full-disk mounts a file system in memory, which needs root")
    try:
        (disk / "other").write_bytes(bytes(rng.randrange(DISK_BYTES)))
        run = disk / "run"
        options = ["--steps", "60", "--checkpoint-every", "1", "--keep", str(rng.choice((2, 8, 60)))]
        output, code = mpitrain("train", *TINY, *options, "--out", str(run))
        reason = verdict(output, code)
        folder = run / "checkpoints"
        found = checkpoint.complete(folder) if folder.exists() else []
        for path in found:
            reason = reason or checkpoint.Parts(path, 1).check()
        if folder.exists() and any(folder.glob(".step-*")):
            reason = reason or "a checkpoint that is half written is left"
        steps = int(found[-1].name.split("-")[1].split(".")[0]) + 1 if found else 1
        return Case("disk", steps, not reason, reason or ("finished" if code == 0 else "refused"))
    finally:
        finished(["umount", str(disk)])
        disk.rmdir()


class Originals:
    """A finished run and a data file, of which copies are damaged. A context manager."""

    def __enter__(self) -> Originals:
        self.folder = Path(tempfile.mkdtemp(prefix="mpitrain-chaos-"))
        self.run, self.data = self.folder / "run", self.folder / "data.h5"
        make = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from benchmarks.chaos_files import write_data; "
        output, code = finished([sys.executable, "-c", f"{make}write_data({str(self.data)!r})"])
        if code:
            raise UsageError(f"no data file could be written:\n{output}")
        self.longer = ["--steps", "30", "--json", "--quiet"]
        options = ["--algorithm", "allreduce", "--steps", "20", "--checkpoint-every", "10"]
        mpitrain("train", *TINY, *options, "--out", str(self.run))
        whole = self.folder / "whole"
        shutil.copytree(self.run, whole)
        self.resumed = result(mpitrain("train", "--resume", str(whole), *self.longer)[0])
        self.trained = result(mpitrain(*self.on_data(self.data))[0])
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def on_data(self, data: Path) -> list[str]:
        """Return the command that trains on a data file."""
        return ["train", "--data", str(data), *TINY[2:], "--steps", "10", "--json", "--verify"]

    def damage(self, kind: str, seed: int) -> Case:
        """Damage a copy of one file, and run the command that reads it."""
        folder = Path(tempfile.mkdtemp(prefix="mpitrain-chaos-"))
        try:
            if kind == "data":
                file = folder / "data.h5"
                shutil.copy(self.data, file)
                command, expected = self.on_data(file), self.trained
            else:
                shutil.copytree(self.run, folder / "run")
                parts = sorted((folder / "run" / "checkpoints").glob("step-*/*.h5"))
                file = parts[-1] if kind == "checkpoint" else folder / "run" / kind
                command = ["train", "--resume", str(folder / "run"), *self.longer]
                expected = self.resumed
                if kind == "result.json":
                    command, expected = ["report", str(folder / "run")], None
            file.write_bytes(damaged(file.read_bytes(), seed))
            output, code = mpitrain(*command)
            reason = verdict(output, code)
            if not reason and code == 0 and expected is not None and result(output) != expected:
                reason = f"another result: {result(output)}, not {expected}"
            return Case(kind, 1, not reason, reason or ("finished" if code == 0 else "refused"))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def result(output: str) -> tuple[float, float] | None:
    """Return loss and accuracy in the JSON document at the end of the output."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            document = json.loads(line)
            return document["test_loss"], document["test_accuracy"]
    return None


def write_data(path: str) -> None:
    """Write a small data file with the digest of an import."""
    import h5py
    import numpy as np

    from mpitrain.data import digest, hdf5_format

    draw = np.random.default_rng(0)
    with h5py.File(path, "w") as content:
        hdf5_format.create(content, classes=["a", "b", "c", "d"], shape=(1, 4, 4), n=(200, 40))
        for split in ("train", "test"):
            labels = draw.integers(0, 4, len(content[split]["labels"]))
            content[split]["labels"][...] = labels
            content[split]["images"][...] = draw.integers(0, 256, content[split]["images"].shape)
        content.attrs["mean"], content.attrs["std"] = np.full(1, 0.5), np.full(1, 0.3)
    with open(path, "r+b") as file:
        digest.add(file)
