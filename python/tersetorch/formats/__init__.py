"""Does it say how a weight is stored? Dataclasses over plain tensors."""
