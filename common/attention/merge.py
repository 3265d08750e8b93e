"""Attention over a part of the keys, and how the parts become one: the log-sum-exp says how much each part weighs.

Softmax divides by the sum of exp(score) over all keys. Whoever has seen some of the keys only has divided by a sum of its
own; it hands on lse = log of that sum beside its output o, and any number of parts can be put together:

    m = max of the lse,  w_i = exp(lse_i - m)
    o = sum w_i o_i / sum w_i                     lse = m + log sum w_i

It does not matter who computes which part, and in which order: pages that many sequences share (torch_native.py), blocks of
keys that come by from other ranks, pages that lie on other ranks (context_parallel.py). Milakov and Gimelshein 2018;
Ring Attention, Liu et al. 2023.
"""

from collections.abc import Sequence

import torch

try:  # a CPU build of torch comes without Triton
    from common.kernels import merge as fused
except ImportError:
    fused = None

Part = tuple[torch.Tensor, torch.Tensor]  # o [..., d], lse [...]


def merge(parts: Sequence[Part]) -> Part:
    """Parts of one attention -> attention over all their keys. o [..., d] in the dtype of the first, lse [...] float32 or wider.

    A part without keys has lse -inf, and its o counts for nothing, whatever stands there. Where no part has any, o is 0 and
    lse -inf: exp(-inf - -inf) would be NaN.
    """
    if len(parts) == 1:
        o, lse = parts[0]
        return o.masked_fill((lse == -torch.inf).unsqueeze(-1), 0), lse
    lse = torch.stack([lse for _, lse in parts])  # [parts, ...]
    best = lse.amax(dim=0)
    best = best.masked_fill(best == -torch.inf, 0)
    weights = (lse - best).exp_()  # [parts, ...]
    total = weights.sum(dim=0)
    share = (weights / total.masked_fill(total == 0, 1)).unsqueeze(-1)
    o = torch.zeros_like(parts[0][0], dtype=share.dtype)
    for (one, one_lse), part in zip(parts, share, strict=True):
        o += part * one.masked_fill((one_lse == -torch.inf).unsqueeze(-1), 0)  # 0 * NaN would be NaN
    return o.to(parts[0][0].dtype), total.log_().add_(best)


def merge_two(one: Part, other: Part) -> torch.Tensor:
    """The o of merge([one, other]) where both have keys: one weight, a few operations instead of many."""
    (o, lse), (other_o, other_lse) = one, other
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1).to(o.dtype)  # exp(b) / (exp(a) + exp(b))
    return torch.lerp(o, other_o, weight)


def merge_into(whole: Part, part: Part) -> None:
    """whole = merge([whole, part]), in place: o [n, H, d] float32 or wider, lse [n, H]."""
    (o, lse), (part_o, part_lse) = whole, part
    if fused and o.is_cuda:
        fused.merge_into(o, lse, part_o, part_lse)
        return
    for old, new in zip(whole, merge([whole, part]), strict=True):
        old.copy_(new)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> Part:
    """q [n, Hq, d], k and v [m, Hkv, d] -> o [n, Hq, d], lse [n, Hq]. Every query sees every key, or if causal (n = m) its own
    and those before.

    By the operators behind scaled_dot_product_attention, called by name because they return the log-sum-exp as well. None of
    them keeps the scores [n, m].
    """
    if len(q) == 0 or len(k) == 0:
        wide = torch.promote_types(q.dtype, torch.float32)
        return torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=wide)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, n or m, d]
    if not q.is_cuda:
        o, lse = attention_with_lse(q, k, v, causal=causal)
    elif q.dtype == torch.float32:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        o, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
        lse = lse[:, :, : q.shape[2]]  # the kernel pads it
    else:
        o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return o[0].transpose(0, 1), lse[0].transpose(0, 1)


def attention_with_lse(q, k, v, mask: torch.Tensor | None = None, causal: bool = False) -> Part:
    """On a CPU: q [B, Hq, n, d], k and v [B, Hkv, m, d] -> o [B, Hq, n, d] and the log-sum-exp of the scores [B, Hq, n]."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal, attn_mask=mask)


def attend_to_each(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: torch.Tensor) -> Part:
    """One query a sequence, behind keys of unequal number: q [B, Hq, d], k and v [B, S, Hkv, d] -> o [B, Hq, d], lse [B, Hq].

    lens [B]: keys from lens[b] >= 1 on count for nothing, but must be numbers.
    """
    hkv = k.shape[2]
    hidden = torch.arange(k.shape[1], device=q.device) >= lens.unsqueeze(1)  # [B, S]
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)[:, None, None]
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # [B, Hkv, S, d]
    q = q.unflatten(1, (hkv, -1))  # [B, Hkv, g, d]: the query heads of a group are rows of one query
    if not q.is_cuda:
        o, lse = attention_with_lse(q, k, v, mask)
    else:  # the scores are as many as the keys: they may lie in memory
        scores = (q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5 + mask
        lse = scores.logsumexp(dim=-1)
        o = (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v
    return o.flatten(1, 2), lse.flatten(1, 2)
