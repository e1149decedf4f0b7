"""Asynchronous SGD with a center that workers push to and pull from."""
