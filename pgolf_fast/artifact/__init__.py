"""The packed model: container, byte budget, loading."""
