"""Measured rows -> a CSV that says where and when."""

import csv
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

FIGURES = Path(__file__).parents[1] / "figures"


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One line a row, the columns of the first row, then device, torch version and date."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    facts = {"device": device, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, [*rows[0], *facts])
        out.writeheader()
        out.writerows(row | facts for row in rows)
    print(f"wrote {path}")
