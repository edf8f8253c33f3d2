"""Requests to diffusion models: their fields, and the route of the server whose clients send them."""
