"""``equinorm trains``: every method of the catalogue in a small network that learns something real, in one table."""
