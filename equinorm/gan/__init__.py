"""What keeps scales in hand in generative adversarial training: blocks, features and penalties, each constant with its reason."""
