"""Engines that TensorRT runs, and the plans that are kept for them."""
