"""The kinds of models: what each makes of a request, its jobs and its turns."""
