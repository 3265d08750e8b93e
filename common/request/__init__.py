"""What both engines do with a request: check what the user gave, keep the answer that grows, take what a step has drawn."""
