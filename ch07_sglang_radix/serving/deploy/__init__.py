"""Scaling out on what exists: manifests and entry points for Kubernetes and Ray. Nothing here decides about requests."""
