"""The lowering of graphs for TensorRT, the rules of its importer, and the building of plans."""
