"""Logits of a loaded model without pages or an engine: what loading gives is judged by what it computes."""

import torch
import torch.nn.functional as F


@torch.inference_mode()
def logits_of(model, ids: list[int]) -> torch.Tensor:
    """ids, one sequence from position 0 -> [T, V] of a model on one rank."""

    def attention(layer, q, k, v):  # [T, H, d] each
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        o = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=True)
        return o.transpose(0, 1)

    hidden = model(torch.tensor(ids), torch.arange(len(ids)), attention)
    return model.compute_logits(hidden)[:, : model.config.vocab_size]
