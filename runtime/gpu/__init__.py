"""GPU kernels built ahead of time: loaded through the GPU's driver, without Triton and without a compiler."""
