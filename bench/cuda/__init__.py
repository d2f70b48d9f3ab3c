"""`tersetorch bench --device cuda`: our CUDA kernels beside torch's dense and sparse ones, on a GPU."""
