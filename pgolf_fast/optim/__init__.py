"""Muon over banks, AdamW groups, learning-rate schedules, weight averages."""
