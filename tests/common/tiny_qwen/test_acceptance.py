"""What stands about the bundled drafters is what was measured, and what is measured is counted right."""

import csv

import numpy as np
import pytest

from common.tiny_qwen import DRAFTER_PATHS, TINY_QWEN_PATH
from common.tiny_qwen.acceptance import CHAINS, SPLITS, asked, measure

NAMES = {"STANDALONE": "draft model", "MEDUSA": "Medusa", "EAGLE": "EAGLE", "EAGLE3": "EAGLE-3"}


def test_the_card_says_what_was_measured():
    with (TINY_QWEN_PATH / "acceptance.csv").open(encoding="utf-8") as file:
        measured = list(csv.DictReader(file))
    assert [(row["algorithm"], row["split"]) for row in measured] == [(a, s) for a in DRAFTER_PATHS for s in SPLITS]
    card = (TINY_QWEN_PATH / "README.md").read_text(encoding="utf-8")
    for row in measured:
        cells = [NAMES[row["algorithm"]], row["split"], str(CHAINS[row["algorithm"]]), row["tokens"]]
        cells += [row[f"right_{n}"] for n in (1, 2, 3, 5, 8)]
        assert f"| {' | '.join(cells)} |" in card


def test_a_step_brings_what_its_shares_say():
    """Tokens a step: one, and the n-th guess with the chance that it and all before it are right; less where answers end."""
    row = measure("EAGLE3", DRAFTER_PATHS["EAGLE3"], 8)[1]
    shares = np.array([float(row[f"right_{n}"] or 0) for n in range(1, 9)])
    most = 1 + np.cumprod(shares).sum()
    assert 0.7 * most < float(row["tokens"]) <= most + 0.01


@pytest.mark.parametrize("split", SPLITS)
def test_every_entry_is_asked_about_in_both_languages(split):
    assert len(asked(split)) == len(set(asked(split))) == 360
