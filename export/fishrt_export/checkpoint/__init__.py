"""Checkpoints as they lie on disk: files, config, family, tokenizer, weights."""
