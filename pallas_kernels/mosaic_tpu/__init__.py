"""The ops as Pallas TPU kernels; imported on first use only, see `pallas_kernels.dispatch`."""
