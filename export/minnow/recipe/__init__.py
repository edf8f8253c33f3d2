"""The recipe of the embedded voice: data, training, and the checkpoint in the official layout. See README.md in this folder."""
