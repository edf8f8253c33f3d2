"""Voices of a server, and recordings inside requests."""
