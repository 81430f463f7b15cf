"""What of a model is trained: a choice of its weights, or small tensors that are added to it."""
