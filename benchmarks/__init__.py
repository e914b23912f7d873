"""Side-by-side measurements of speed. Nothing in the package or the tests depends on them."""
