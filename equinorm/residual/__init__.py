"""Signal preservation without measuring the signal: scaled residual branches, bounded functions in place of norms, clipped gradients."""
