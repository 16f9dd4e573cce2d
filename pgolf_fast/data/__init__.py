"""Tokens: shards, batches, tokenizer, corpora."""
