"""Corpus preparation: texts of many sources cleaned, deduplicated, tokenised and sharded."""
