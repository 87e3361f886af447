"""A forward pass a layer, or an expert, at a time."""
