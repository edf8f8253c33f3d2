"""What all commands share: options, the program as a whole, progress, and lines of output."""
