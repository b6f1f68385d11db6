"""The model and nothing about streams."""
