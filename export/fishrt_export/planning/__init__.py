"""What an export writes, found and checked before anything is written: one file for each kind of model."""
