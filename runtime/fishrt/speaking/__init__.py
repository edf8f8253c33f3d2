"""Requests while they are spoken, whatever the kind of model: jobs, their turns, their streams, and the scheduler of many."""
