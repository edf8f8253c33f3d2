"""Repositories of the Hugging Face Hub: their names, their files, and errors in words."""
