"""Weight norms: parametrizations of a layer's weights, and layers that carry one. Nothing here looks at activations."""
