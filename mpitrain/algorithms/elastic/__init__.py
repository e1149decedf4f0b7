"""Elastic averaging: workers tied to a center by springs, and consensus ADMM."""
