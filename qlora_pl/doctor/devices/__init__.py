"""The GPUs and the CPU, as driver, torch and allocator see them."""
