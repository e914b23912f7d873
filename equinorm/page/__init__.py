"""What HTML reports have in common: one style sheet, light and dark, wide and narrow, and figures that follow it."""
