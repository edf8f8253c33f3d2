"""A checkpoint's own integers as graphs store and read them, without a second rounding."""
