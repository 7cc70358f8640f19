"""From a model to layer specs, and from a plan to a model."""
