"""The network over weight banks."""
