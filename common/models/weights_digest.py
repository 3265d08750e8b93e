"""Which weights are these? A digest of every number of a model, cheap enough to be taken at each start."""

from hashlib import sha256

import torch
from torch import nn

from common.layers.cpu_linear import row_major
from common.layers.vocab import ParallelLMHead

PIECE = 1 << 24  # words at a time


@torch.no_grad()
def weights_digest(model: nn.Module) -> bytes:
    """SHA-256 of the names, types, shapes and two sums over the bits of all parameters and buffers of this rank.

    The sums, of the words x_i and of x_i (2 i + 1) modulo 2^64, are computed where the weights lie: a GPU reads them once, and
    nothing but 16 bytes a tensor travels. Any one number that changes, changes the digest; against somebody who wants two models
    to look alike, it is no protection. In which form a matrix lies changes nothing: that is measured at each start.
    """
    digest = sha256()
    # a tied head may have a copy in another form, and its embedding may lie in bfloat16 then (cpu_linear.share)
    tied = [head for head in model.modules() if isinstance(head, ParallelLMHead) and head.tied]
    copies, shared = {id(head.copy) for head in tied}, {id(head.weight): head.dtype for head in tied}
    for name, x in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda one: one[0]):
        if id(x) in copies:
            continue
        x = x.detach().to(shared.get(id(x), x.dtype))  # noqa: PLW2901, the same numbers
        said = None if x.is_meta else _sums(row_major(x))  # meta: its numbers are another tensor's
        digest.update(f"{name} {x.dtype} {tuple(x.shape)} {said}\n".encode())
    return digest.digest()


def _sums(x: torch.Tensor) -> tuple[int, int]:
    x = x.clone() if x.storage_offset() else x  # or words would begin between two of the memory's
    data = x.reshape(-1).view(torch.uint8) if x.numel() else x.new_empty(0, dtype=torch.uint8)
    rest = len(data) % 8
    words = data[: len(data) - rest].view(torch.int64) if len(data) >= 8 else data[:0].to(torch.int64)
    plain = weighted = 0
    pieces = [words[first : first + PIECE] for first in range(0, len(words), PIECE)]
    pieces += [data[len(data) - rest :].to(torch.int64)]
    at = 0
    for piece in pieces:
        odd = torch.arange(at, at + len(piece), device=x.device) * 2 + 1
        plain += int(piece.sum())
        weighted += int((piece * odd).sum())
        at += len(piece)
    return plain % (1 << 64), weighted % (1 << 64)
