"""Tokens: shards, loaders, tokenizer, corpora."""
