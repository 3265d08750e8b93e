"""SGLang's entry and management layers: a socket, a tokenizer manager, a scheduler process, a detokenizer, and the wire between."""
