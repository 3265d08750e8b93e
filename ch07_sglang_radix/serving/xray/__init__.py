"""The X-ray page: radix tree, pages, requests and messages of a running engine, or of a recording, step by step."""
