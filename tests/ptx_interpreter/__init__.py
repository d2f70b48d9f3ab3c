"""Executes the PTX that nvcc makes of the CUDA kernels, on the CPU, and compares what it leaves in memory."""
