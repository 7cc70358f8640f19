"""What Arm's Vela compiler estimates for int8 files on an Ethos-U, the NPU of microcontrollers.

    pip install ethos-u-vela
    python benchmarks/npu.py files/resnet20/original.int8.tflite files/resnet20/*.int8.tflite

prints a Markdown table, relative to the first file. `benchmarks/expect.py` makes such files. Vela
compiles each file and estimates its time; nothing runs, so the figures have no noise and are no
measurements.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="int8 files; the first is the original")
    parser.add_argument("--accelerator", default="ethos-u55-128", help="(default: ethos-u55-128)")
    parser.add_argument("--vela", default="vela", help="the command (default: vela)")
    return parser.parse_args()


class Estimate(NamedTuple):
    """What Vela says of a file: seconds, bytes of weights in flash, peak bytes of activations."""

    seconds: float
    flash: float
    activations: float
    on_cpu: list[str]


def estimate(file: Path, accelerator: str, vela: str) -> Estimate:
    """Compiles a file."""
    with tempfile.TemporaryDirectory() as folder:
        command = [vela, str(file), "--accelerator-config", accelerator, "--output-dir", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        tables = list(Path(folder).glob("*summary*.csv"))
        if done.returncode or not tables:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        with tables[0].open() as table:
            row = next(csv.DictReader(table))
    left = re.findall(r"operator: (\w+)", done.stdout + done.stderr)
    return Estimate(
        float(row["inference_time"]),
        1024 * float(row["off_chip_flash_memory_used"]),
        1024 * float(row["sram_memory_used"]),
        sorted({name for name in left if name not in ("QUANTIZE", "DEQUANTIZE")}),
    )


def main() -> None:
    arguments = parse_arguments()
    files = list(dict.fromkeys(arguments.files))
    found = [estimate(file, arguments.accelerator, arguments.vela) for file in files]
    first = found[0]
    print(
        f"{arguments.accelerator}: {1e3 * first.seconds:.3f} ms, {first.flash / 1e3:.0f} kB in "
        f"flash, {first.activations / 1e3:.0f} kB of activations\n\n"
        "| file | time | flash | activations | left to the CPU |\n|---|---|---|---|---|"
    )
    for file, row in zip(files, found, strict=True):
        print(
            f"| {file.name.removesuffix('.tflite')} | {row.seconds / first.seconds:.2f} "
            f"| {row.flash / first.flash:.2f} | {row.activations / first.activations:.2f} "
            f"| {', '.join(row.on_cpu) or '–'} |"
        )


if __name__ == "__main__":
    main()
