"""Does it repeat a paper's row? Each file trains, compresses and measures one, beside the published figures."""
