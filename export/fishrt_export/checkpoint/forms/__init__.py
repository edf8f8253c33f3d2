"""Forms of weights that people hold: which form a file has, told by the names and types of its tensors. Loads no torch."""
