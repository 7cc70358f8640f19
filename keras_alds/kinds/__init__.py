"""Every kind of layer that the package knows, one file a kind."""
