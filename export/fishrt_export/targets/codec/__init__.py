"""Forms of a codec for CPUs."""
