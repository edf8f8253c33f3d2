"""Voices: recordings with their words, their codes, their loudness, and stores of them."""
