"""A torch module becomes a verified ONNX graph: trace, store, quantise, verify."""
