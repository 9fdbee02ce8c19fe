"""HTTP server for a reward model, and its clients."""
