"""The codecs as torch modules, their checkpoints and their graphs."""
