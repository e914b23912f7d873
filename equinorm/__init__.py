"""equinorm: every published normalization method for PyTorch, exact and fast, and the instruments to choose among them."""
