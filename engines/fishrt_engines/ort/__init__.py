"""Engines that ONNX Runtime runs: on the CPU, CUDA and CoreML."""
