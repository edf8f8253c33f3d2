"""A language model or a codec of a checkpoint as graph jobs."""
