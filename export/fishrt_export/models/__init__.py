"""The torch modules of every family."""
