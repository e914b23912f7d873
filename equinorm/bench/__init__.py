"""Measurements on the user's own machine: how fast beside what else there is, and how exact."""
