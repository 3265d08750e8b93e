"""LoRA adapters, and weights that change while an engine serves. The tour is in README.md.

What a rank computes (two thin matrices beside each big one, weights written in place) is in `common/`, so that every engine has it.
Here is what decides: which adapters are loaded, who may run together, when weights change; and the walk through all of it.
"""
