"""Rows -> a CSV. What was measured says where and when; what was counted is the same everywhere."""

import argparse
import csv
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

FIGURES = Path(__file__).parents[2] / "figures"


def write_csv(rows: Sequence[dict[str, Any]], path: Path, measured: bool = True) -> None:
    """One line a row, the columns of the first row; then, if measured, device, torch version and date."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    facts = {"device": device, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")} if measured else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, [*rows[0], *facts])
        out.writeheader()
        out.writerows(row | facts for row in rows)
    print(f"wrote {path}")


def csv_option(description: str) -> Path | None:
    """The command line of a demo that can also write what it shows, for a figure: `--csv FILE`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write what the picture is drawn from")
    return parser.parse_args().csv
