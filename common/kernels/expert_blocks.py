"""Pairs of (token, choice) sorted by expert and padded to blocks: what the fused kernel needs to know, in plain PyTorch.

A matrix product wants many rows for one matrix; the router leaves rows that each want their own. Sorted by expert, the rows
of an expert lie side by side; padded to a multiple of the block, each block has one expert, and the program that computes
it needs one number to find its weights.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ExpertBlocks:
    """pairs [n * block]: token * k + choice, or the sentinel T * k as padding; experts [n]: whose block; count [1]: how many."""

    pairs: torch.Tensor
    experts: torch.Tensor
    count: torch.Tensor


def most_blocks(pairs: int, num_experts: int, block: int) -> int:
    """More cannot be: every touched expert begins one, the pairs left over fill whole ones."""
    touched = min(pairs, num_experts)
    return touched + (pairs - touched) // block


def expert_blocks(experts: torch.Tensor, num_experts: int, block: int) -> ExpertBlocks:
    """experts [T, k], -1 where the expert is not on this rank -> the blocks, exactly as many as there are."""
    flat = experts.flatten()
    order = flat.sort(stable=True).indices
    order = order[int((flat < 0).sum()) :]  # those of other ranks stand first
    chosen = torch.bincount(flat[order], minlength=num_experts)
    blocks = -(-chosen // block)
    pairs = torch.full((int(blocks.sum()) * block,), flat.numel())
    starts = (blocks.cumsum(0) - blocks) * block  # of each expert, among the padded
    shift = starts - (chosen.cumsum(0) - chosen)
    pairs[torch.arange(len(order)) + shift[flat[order]]] = order
    owner = torch.arange(num_experts).repeat_interleave(blocks)
    return ExpertBlocks(pairs, owner, blocks.sum().view(1))
