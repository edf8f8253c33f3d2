"""Text: pieces, cleaning, tokenizer, the letters that a model reads."""
