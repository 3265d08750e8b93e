"""The other ways to be many: pipeline, data, sequence and context parallelism. The tour is in README.md.

What a rank computes and how ranks talk is in `common/`, so that every engine has it; how the chapter's engine decides over
several stages and data ranks is in its core. Here is what stands in front of engines (replicas, load balancing, a router), and the
walk through all of it.
"""
