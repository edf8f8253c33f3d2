"""A bundle: its manifest, its files, its graphs, downloads."""
