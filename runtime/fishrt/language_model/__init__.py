"""The dual-AR language model: prompt, loop, drawing, sampling."""
