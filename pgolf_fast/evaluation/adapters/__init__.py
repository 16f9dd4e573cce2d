"""Adapters: what a model may do with tokens that already have their score."""
