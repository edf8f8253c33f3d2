"""Jobs for the engine of `jobs/`: lines of text that are spoken, recordings that are encoded."""
