"""Where this lives in SGLang: is everything at the lines that the README names?

    pip download sglang==0.5.23 --no-deps && unzip -q sglang-0.5.23-*.whl -d sglang-0.5.23
    python -m ch07_sglang_radix.sglang_map sglang-0.5.23

The chapter's README and its server's are read, and the release looked up: each line that they name must be there, and where
a table says that something lives, a class or a function must begin. Ends with exit code 1 and the places that are not so.
"""

import argparse
import re
from pathlib import Path

from common.distributed.launch import run_main

VERSION = "0.5.23"
README = Path(__file__).with_name("README.md")
SERVER_S = README.parent / "serving" / "README.md"
MAPS = ("Where this lives in SGLang", "From here into the real source")  # sections whose tables name definitions
REFERENCE = re.compile(r"([\w/]+\.py):(\d+)((?:(?:, | and | to )\d+)*)")
BEGINS = re.compile(r"\s*(class|def|async def) \w")

Place = tuple[str, int]  # file below sglang/srt, line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help=f"where the wheel of sglang {VERSION} was unpacked")
    folder = parser.parse_args().folder / "sglang"
    check_version(folder)
    report("lines that exist", places_named(), folder / "srt", re.compile(r"\s*\S"))
    report("of them, classes and functions of the tables", places_mapped(), folder / "srt", BEGINS)


def check_version(folder: Path) -> None:
    file = folder / "_version.py"
    said = re.search(r"version = '(\S+?)'", file.read_text(encoding="utf-8")) if file.is_file() else None
    if said is None or said[1] != VERSION:
        raise ValueError(f"the map is of sglang {VERSION}, {folder} holds {said and said[1]}; unpack that wheel")


def report(said: str, places: list[Place], root: Path, wanted: re.Pattern[str]) -> None:
    wrong = [f"{file}:{line}" for file, line in places if not wanted.match(text_at(root / file, line))]
    print(f"{said}: {len(places) - len(wrong)} of {len(places)}")
    if wrong:
        raise ValueError(f"not what the README says: {', '.join(wrong)}")


def text_at(path: Path, line: int) -> str:
    """Empty if there is no such line."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return lines[line - 1] if 0 < line <= len(lines) else ""


def places_named() -> list[Place]:
    """Every line of SGLang that the READMEs name, anywhere."""
    found = [one for readme in (README, SERVER_S) for one in REFERENCE.findall(readme.read_text(encoding="utf-8"))]
    places = [(file, int(n)) for file, first, more in found for n in (first, *re.findall(r"\d+", more))]
    return list(dict.fromkeys(places + places_mapped()))


def places_mapped() -> list[Place]:
    """The second column of the tables that say where something lives: files, each with one or several lines."""
    places = []
    for title in MAPS:
        section = README.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        for cell in re.findall(r"^\|[^|]*\|([^|]*\.py:[^|]*)\|", section, re.MULTILINE):
            for file, rest in re.findall(r"([\w/]+\.py):((?:(?!\w+\.py:|\w+/).)*)", cell):
                places += [(file, int(n)) for n in re.findall(r"\b\d+\b", rest)]
    return list(dict.fromkeys(places))


if __name__ == "__main__":
    run_main(main)
