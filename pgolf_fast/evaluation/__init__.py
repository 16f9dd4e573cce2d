"""Bits per byte: windows, sliding scores, legal test-time training."""
