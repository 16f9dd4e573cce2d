"""Ablations: a baseline and its variants under one budget, and what can be said about their differences."""
