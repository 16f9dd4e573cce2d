"""Studies of trained models: their weights, their error surface, their hash table, their losses."""
