"""Graphs for one provider or one kind of CPU, made of the portable ones."""
