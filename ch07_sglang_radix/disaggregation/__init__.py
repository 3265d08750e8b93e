"""Prefill on one engine, decode on another: the K and V of a prompt travel between them, page by page (README.md)."""
