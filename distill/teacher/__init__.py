"""Teacher room: prompts and a model flow in, targets flow into a cache."""
