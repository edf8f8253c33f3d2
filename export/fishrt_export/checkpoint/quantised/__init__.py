"""Exact values of quantised weights: each layer is read and widened when it is looked up."""
