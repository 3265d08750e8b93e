"""Mixtures of experts, and one row of cache for all heads. The tour is in README.md.

What a rank computes (the router, the experts, how rows reach them, latent attention) is in `common/`, so that every engine has it.
Here is what decides: which rank holds which expert, and when that is to change; and the walk through all of it.
"""
