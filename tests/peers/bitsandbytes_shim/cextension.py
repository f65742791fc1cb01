"""What bitsandbytes' tests ask of its native library: which accelerator it was built for."""

HIP_ENVIRONMENT = False
ROCM_GPU_ARCH = "unknown"
ROCM_WARP_SIZE_64 = False
