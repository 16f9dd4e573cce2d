"""Muon over banks, AdamW groups, schedules, weight averages."""
