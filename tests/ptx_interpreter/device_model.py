"""Constants of the CUDA runtime, and the device that the fake runtime pretends to have."""

ERRORS = {
    0: ("cudaSuccess", "no error"),
    1: ("cudaErrorInvalidValue", "invalid argument"),
    2: ("cudaErrorMemoryAllocation", "out of memory"),
    3: ("cudaErrorInitializationError", "initialization error"),
    35: (
        "cudaErrorInsufficientDriver",
        "CUDA driver version is insufficient for CUDA runtime version",
    ),
    98: ("cudaErrorInvalidDeviceFunction", "invalid device function"),
    100: ("cudaErrorNoDevice", "no CUDA-capable device is detected"),
    101: ("cudaErrorInvalidDevice", "invalid device ordinal"),
    209: ("cudaErrorNoKernelImageForDevice", "no kernel image is available for execution"),
    400: ("cudaErrorInvalidResourceHandle", "invalid resource handle"),
    719: ("cudaErrorLaunchFailure", "unspecified launch failure"),
    801: ("cudaErrorNotSupported", "operation not supported"),
    999: ("cudaErrorUnknown", "unknown error"),
}
INVALID_VALUE, OUT_OF_MEMORY, NO_DRIVER, INVALID_FUNCTION = 1, 2, 35, 98
NO_DEVICE, INVALID_DEVICE, INVALID_HANDLE, LAUNCH_FAILURE = 100, 101, 400, 719
DRIVER_VERSION = 13000

# cudaDeviceAttr
ATTRIBUTES = {
    "maxThreadsPerBlock": 1,
    "maxBlockDimX": 2,
    "maxBlockDimY": 3,
    "maxBlockDimZ": 4,
    "maxGridDimX": 5,
    "maxGridDimY": 6,
    "maxGridDimZ": 7,
    "maxSharedMemoryPerBlock": 8,
    "totalConstantMemory": 9,
    "warpSize": 10,
    "maxRegistersPerBlock": 12,
    "clockRate": 13,
    "multiProcessorCount": 16,
    "integrated": 18,
    "canMapHostMemory": 19,
    "computeMode": 20,
    "concurrentKernels": 31,
    "memoryClockRate": 36,
    "globalMemoryBusWidth": 37,
    "l2CacheSize": 38,
    "maxThreadsPerMultiProcessor": 39,
    "asyncEngineCount": 40,
    "unifiedAddressing": 41,
    "computeCapabilityMajor": 75,
    "computeCapabilityMinor": 76,
    "maxSharedMemoryPerMultiprocessor": 81,
    "maxRegistersPerMultiprocessor": 82,
    "managedMemory": 83,
    "pageableMemoryAccess": 88,
    "concurrentManagedAccess": 89,
    "computePreemptionSupported": 90,
    "cooperativeLaunch": 95,
    "maxSharedMemoryPerBlockOptin": 97,
    "hostRegisterSupported": 99,
    "pageableMemoryAccessUsesHostPageTables": 100,
    "directManagedMemAccessFromHost": 101,
    "maxBlocksPerMultiprocessor": 106,
    "maxPersistingL2CacheSize": 108,
    "reservedSharedMemoryPerBlock": 111,
    "memoryPoolsSupported": 115,
    "clusterLaunch": 120,
}
ATTRIBUTE_NAMES = {number: name for name, number in ATTRIBUTES.items()}

# The made-up card: limits of compute capability 8.0 with few multiprocessors, so that grids that
# follow the device stay small.
DEFAULT_ATTRIBUTES = {
    "maxThreadsPerBlock": 1024,
    "maxBlockDimX": 1024,
    "maxBlockDimY": 1024,
    "maxBlockDimZ": 64,
    "maxGridDimX": 2**31 - 1,
    "maxGridDimY": 65535,
    "maxGridDimZ": 65535,
    "maxSharedMemoryPerBlock": 48 << 10,
    "totalConstantMemory": 64 << 10,
    "warpSize": 32,
    "maxRegistersPerBlock": 65536,
    "clockRate": 1410000,
    "multiProcessorCount": 4,
    "integrated": 0,
    "canMapHostMemory": 1,
    "computeMode": 0,
    "concurrentKernels": 1,
    "memoryClockRate": 1215000,
    "globalMemoryBusWidth": 5120,
    "l2CacheSize": 40 << 20,
    "maxThreadsPerMultiProcessor": 2048,
    "asyncEngineCount": 3,
    "unifiedAddressing": 1,
    "computeCapabilityMajor": 8,
    "computeCapabilityMinor": 0,
    "maxSharedMemoryPerMultiprocessor": 164 << 10,
    "maxRegistersPerMultiprocessor": 65536,
    "managedMemory": 1,
    "pageableMemoryAccess": 0,
    "concurrentManagedAccess": 1,
    "computePreemptionSupported": 1,
    "cooperativeLaunch": 1,
    "maxSharedMemoryPerBlockOptin": 163 << 10,
    "hostRegisterSupported": 1,
    "pageableMemoryAccessUsesHostPageTables": 0,
    "directManagedMemAccessFromHost": 0,
    "maxBlocksPerMultiprocessor": 32,
    "maxPersistingL2CacheSize": 30 << 20,
    "reservedSharedMemoryPerBlock": 1024,
    "memoryPoolsSupported": 1,
    "clusterLaunch": 0,
}

ADVICE = {
    1: "SetReadMostly",
    2: "UnsetReadMostly",
    3: "SetPreferredLocation",
    4: "UnsetPreferredLocation",
    5: "SetAccessedBy",
    6: "UnsetAccessedBy",
}
LOCATIONS = {0: "invalid", 1: "device", 2: "host", 3: "host_numa", 4: "host_numa_current"}
MEMCPY_KINDS = {
    0: "host_to_host",
    1: "host_to_device",
    2: "device_to_host",
    3: "device_to_device",
    4: "default",
}
MEMORY_TYPES = {"unregistered": 0, "host": 1, "device": 2, "managed": 3}
FUNCTION_MAX_DYNAMIC_SHARED = 8  # cudaFuncAttributeMaxDynamicSharedMemorySize
FUNCTION_SHARED_CARVEOUT = 9
