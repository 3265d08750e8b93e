"""Rows and logits that the tests here share."""

import torch

from common.sampling.batch import SamplingRow
from common.sampling.sampler import sample


def row(params, seed=0, prompt=(0,), output=(), **more):
    return SamplingRow(params, seed, list(prompt), list(output), **more)


def random_logits(size, vocab, seed=0):
    return 2 * torch.randn(size, vocab, generator=torch.Generator().manual_seed(seed))


def draws(logits, params, count, prompt=(0,), output=()):
    """The tokens that `count` requests with seeds 0, 1, ... get from the same logits."""
    rows = [row(params, seed, prompt, output) for seed in range(count)]
    return sample(torch.tensor(logits).expand(count, -1), rows).tokens.tolist()


def one(logits, params, **of_row):
    return sample(torch.tensor([logits]), [row(params, **of_row)]).tokens.item()
