"""Does it have a forward()? Drop-in modules with buffers and parameters only."""
