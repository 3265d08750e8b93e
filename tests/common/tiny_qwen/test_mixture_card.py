"""What the model card says of the mixture is what its files say."""

import csv

import pytest
from safetensors import safe_open

from common.models.config import ModelConfig
from common.tiny_qwen import TINY_QWEN_PATH
from common.tiny_qwen.upcycle import MIXTURE_PATH

CARD = (
    (TINY_QWEN_PATH / "README.md")
    .read_text(encoding="utf-8")
    .split("## A mixture that speaks")[1]
    .split("## Latent attention that speaks")[0]
)
FOLDERS = (TINY_QWEN_PATH, MIXTURE_PATH)


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def parameters(folder, used_by_a_token: bool) -> int:
    mixture, count = ModelConfig.from_folder(folder).mixture, 0
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no mapping
            rows, columns = [*file.get_slice(name).get_shape(), 1][:2]
            chosen = used_by_a_token and ".experts." in name
            count += rows * columns * mixture.router.top_k // mixture.num_experts if chosen else rows * columns
    return count


def line_of(name: str) -> list[str]:
    (line,) = [line for line in CARD.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_parameters_are_those_in_the_files():
    assert line_of("parameters") == [f"{parameters(folder, False):,}" for folder in FOLDERS]
    assert line_of("of which a token uses") == [f"{parameters(folder, True):,}" for folder in FOLDERS]
    sizes = [(folder / "model.safetensors").stat().st_size for folder in FOLDERS]
    assert line_of("weights in bfloat16") == [f"{size / 1e6:.1f} MB" for size in sizes]
    assert max(sizes) <= 12_000_000


def test_columns_are_those_of_the_config():
    config = ModelConfig.from_folder(MIXTURE_PATH)
    mixture = config.mixture
    met = mixture.shared_size + mixture.router.top_k * mixture.intermediate_size
    whole = mixture.shared_size + mixture.num_experts * mixture.intermediate_size
    dense = ModelConfig.from_folder(TINY_QWEN_PATH).intermediate_size
    said = line_of("MLP columns that a token meets, of all in a layer")
    assert said == [f"{dense} of {dense}", f"{met} of {whole:,}"]


@pytest.mark.parametrize(
    ("name", "split", "dtype"),
    [
        ("answers right, float32", "", "float32"),
        ("answers right, bfloat16", "", "bfloat16"),
        ("trained wordings", "trained", "float32"),
        ("unseen wordings", "unseen", "float32"),
        ("follow-ups, trained", "follow-up, trained", "float32"),
        ("follow-ups, unseen", "follow-up, unseen", "float32"),
    ],
)
def test_answers_are_those_of_the_evaluations(name, split, dtype):
    said = []
    for folder in FOLDERS:
        rows = [r for r in rows_of(folder / "evaluation.csv") if r["dtype"] == dtype and split in ("", r["split"])]
        right, asked = (sum(int(row[key]) for row in rows) for key in ("exact", "asked"))
        said.append(f"{right:,} of {asked:,}, {right / asked:.1%}".replace("%", " %"))
    assert line_of(name) == said


def test_routes_are_those_of_the_csv():
    for row in rows_of(MIXTURE_PATH / "routing.csv"):
        cells = [row[key] for key in ("layer", "hottest", "coldest", "entropy", "language", "place", "chance", "token")]
        assert f"| {' | '.join(cells)} |" in CARD
        assert f"{int(row['tokens']):,} tokens" in CARD.replace("\n", " ")
