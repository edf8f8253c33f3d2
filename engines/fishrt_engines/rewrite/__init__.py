"""Graphs rewritten for a provider when they are opened."""
