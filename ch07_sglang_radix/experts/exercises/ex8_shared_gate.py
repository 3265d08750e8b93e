"""Exercise 8: A gate for the expert that all share (20 minutes).

Read  "A router chooses" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.experts.exercises.check 8

In Qwen2-MoE every token also goes through one shared expert. What that gives counts as much as a gate says, one number g for
the whole model's layer: sigmoid(g . x), of this token's x.

    layer(x)  =  what the chosen experts give, weighted and summed  +  sigmoid(g . x) * what the shared expert gives

On R ranks each has some columns of every expert, the shared one too: of both a rank has partial sums, which the others' must be
added to. x and g are the same on all ranks. Write what a rank adds to the layer's sum, so that ONE sum over the ranks at the
end makes the layer; nobody talks before. Leave the arguments as they are.

    x        [T, D]    the tokens
    g        [D]       the gate
    routed   [T, D]    this rank's partial sums of the chosen experts, weighted already
    shared   [T, D]    this rank's partial sums of the shared expert
    returns  [T, D]

    x = [[2, 0]], g = [0, 5], routed = [[1, 1]], shared = [[4, 6]]    ->  [[3, 4]]       sigmoid(0) = 0.5
"""

import torch


def part(x: torch.Tensor, g: torch.Tensor, routed: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError  # your turn
