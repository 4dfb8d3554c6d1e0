"""A model as calls, and labels that run through it."""
