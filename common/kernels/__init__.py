"""Triton forms of the attention contract. Imported on NVIDIA GPUs only; Triton comes with torch on Linux."""
