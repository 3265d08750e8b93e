"""Files that a user names: rows -> a CSV, values -> JSON. What was measured says where and when; what was counted does not."""

import argparse
import csv
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

FIGURES = Path(__file__).parents[2] / "figures"


@contextmanager
def output_file(path: str | os.PathLike) -> Iterator[TextIO]:
    """`path`, open for writing. OSError names the file, whatever fails: a disk is full in `write` or only in `close`."""
    try:
        with open(path, "w", newline="", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def write_json(value: Any, path: Path) -> None:
    with output_file(path) as file:
        file.write(json.dumps(value, indent=1) + "\n")


def this_device() -> str:
    """As rows name it."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"


def write_csv(rows: Sequence[dict[str, Any]], path: Path, measured: bool = True) -> None:
    """One line a row, the columns of the first row; then, if measured, device, torch version and date.

    A row that was measured elsewhere brings its own three.
    """
    facts = {"device": this_device(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")} if measured else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with output_file(path) as file:
        out = csv.DictWriter(file, list(dict.fromkeys([*rows[0], *facts])))
        out.writeheader()
        out.writerows(facts | row for row in rows)
    print(f"wrote {path}")


def csv_option(description: str) -> Path | None:
    """The command line of a demo that can also write what it shows, for a figure: `--csv FILE`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write what the picture is drawn from")
    return parser.parse_args().csv
