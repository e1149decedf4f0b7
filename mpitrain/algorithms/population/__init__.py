"""Populations of models that train and reproduce."""
