"""A reward model behind HTTP, and its clients."""
