"""OpenAI's completions and chat over the tokenizer manager: what the official client sends, and what it reads."""
