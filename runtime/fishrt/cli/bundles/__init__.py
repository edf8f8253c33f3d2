"""Commands that make, fetch and show bundles."""
