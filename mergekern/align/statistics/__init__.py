"""Moments of activations of several models."""
