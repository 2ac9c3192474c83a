/* legacy.h -- what softgpu's driver offers, in one list: ENTRY(name, since, function).
 *
 *   cuGetProcAddress("cuMemAlloc", 12000) --> the newest one whose `since` <= 12000
 *   dlsym("cuMemAlloc"), dlsym("cuMemAlloc_v2") --> a trap: exit code 87
 *
 * `since` is the CUDA version of the ABI that cuda.h of 13.0 declares (cudaTypedefs.h); older ABIs
 * of a name are not offered.  NEWER is a second ABI of a name that has an ENTRY.                 */
#define SG_ENTRIES(ENTRY, NEWER)                                                                 \
    ENTRY(cuInit, 2000, init)                                                                    \
    ENTRY(cuDriverGetVersion, 2020, driver_version)                                              \
    ENTRY(cuGetErrorName, 6000, error_name)                                                      \
    ENTRY(cuGetErrorString, 6000, error_string)                                                  \
    ENTRY(cuDeviceGetCount, 2000, device_count)                                                  \
    ENTRY(cuDeviceGet, 2000, device_get)                                                         \
    ENTRY(cuDeviceGetName, 2000, device_name)                                                    \
    ENTRY(cuDeviceGetUuid, 11040, device_uuid)                                                   \
    ENTRY(cuDeviceTotalMem, 3020, device_total)                                                  \
    ENTRY(cuDeviceGetAttribute, 2000, device_attribute)                                          \
    ENTRY(cuDevicePrimaryCtxRetain, 7000, primary_retain)                                        \
    ENTRY(cuDevicePrimaryCtxRelease, 11000, primary_release)                                     \
    ENTRY(cuDevicePrimaryCtxSetFlags, 11000, primary_flags)                                      \
    ENTRY(cuDevicePrimaryCtxGetState, 7000, primary_state)                                       \
    ENTRY(cuCtxSetCurrent, 4000, ctx_set)                                                        \
    ENTRY(cuCtxGetCurrent, 4000, ctx_get)                                                        \
    ENTRY(cuCtxGetDevice, 2000, ctx_device)                                                      \
    NEWER(cuCtxGetDevice, 13000, ctx_device_of)                                                  \
    ENTRY(cuCtxSynchronize, 2000, ctx_synchronize)                                               \
    NEWER(cuCtxSynchronize, 13000, ctx_synchronize_of)                                           \
    ENTRY(cuCtxGetStreamPriorityRange, 5050, priority_range)                                     \
    ENTRY(cuModuleLoadData, 2000, module_load)                                                   \
    ENTRY(cuModuleLoadDataEx, 2010, module_load_ex)                                              \
    ENTRY(cuModuleUnload, 2000, module_unload)                                                   \
    ENTRY(cuModuleGetFunction, 2000, module_function)                                            \
    ENTRY(cuModuleGetGlobal, 3020, module_global)                                                \
    ENTRY(cuLibraryLoadData, 12000, library_load)                                                \
    ENTRY(cuLibraryUnload, 12000, library_unload)                                                \
    ENTRY(cuLibraryGetKernel, 12000, library_kernel)                                             \
    ENTRY(cuLibraryGetGlobal, 12000, library_global)                                             \
    ENTRY(cuKernelGetFunction, 12000, kernel_function)                                           \
    ENTRY(cuFuncGetAttribute, 2020, func_get)                                                    \
    ENTRY(cuFuncSetAttribute, 9000, func_set)                                                    \
    ENTRY(cuFuncGetName, 12030, func_name)                                                       \
    ENTRY(cuOccupancyMaxActiveBlocksPerMultiprocessor, 6050, occupancy)                          \
    ENTRY(cuMemAlloc, 3020, mem_alloc)                                                           \
    ENTRY(cuMemFree, 3020, mem_free)                                                             \
    ENTRY(cuMemGetInfo, 3020, mem_info)                                                          \
    ENTRY(cuMemHostAlloc, 2020, host_alloc)                                                      \
    ENTRY(cuMemAllocHost, 3020, alloc_host)                                                      \
    ENTRY(cuMemFreeHost, 2000, host_free)                                                        \
    ENTRY(cuMemHostRegister, 6050, host_register)                                                \
    ENTRY(cuMemHostUnregister, 4000, host_unregister)                                            \
    ENTRY(cuMemHostGetDevicePointer, 3020, host_pointer)                                         \
    ENTRY(cuMemcpy, 4000, copy)                                                                  \
    ENTRY(cuMemcpyHtoD, 3020, copy_htod)                                                         \
    ENTRY(cuMemcpyDtoH, 3020, copy_dtoh)                                                         \
    ENTRY(cuMemcpyDtoD, 3020, copy_dtod)                                                         \
    ENTRY(cuMemcpyAsync, 4000, copy_async)                                                       \
    ENTRY(cuMemcpyHtoDAsync, 3020, copy_htod_async)                                              \
    ENTRY(cuMemcpyDtoHAsync, 3020, copy_dtoh_async)                                              \
    ENTRY(cuMemcpyDtoDAsync, 3020, copy_dtod_async)                                              \
    ENTRY(cuMemsetD8, 3020, set_d8)                                                              \
    ENTRY(cuMemsetD32, 3020, set_d32)                                                            \
    ENTRY(cuMemsetD8Async, 3020, set_d8_async)                                                   \
    ENTRY(cuMemsetD32Async, 3020, set_d32_async)                                                 \
    ENTRY(cuStreamCreate, 2000, stream_create)                                                   \
    ENTRY(cuStreamCreateWithPriority, 5050, stream_create_priority)                              \
    ENTRY(cuStreamDestroy, 4000, stream_destroy)                                                 \
    ENTRY(cuStreamSynchronize, 2000, stream_synchronize)                                         \
    ENTRY(cuStreamQuery, 2000, stream_query)                                                     \
    ENTRY(cuStreamWaitEvent, 3020, stream_wait)                                                  \
    ENTRY(cuEventCreate, 2000, event_create)                                                     \
    ENTRY(cuEventRecord, 2000, event_record)                                                     \
    ENTRY(cuEventSynchronize, 2000, event_synchronize)                                           \
    ENTRY(cuEventQuery, 2000, event_query)                                                       \
    ENTRY(cuEventElapsedTime, 2000, event_elapsed)                                               \
    NEWER(cuEventElapsedTime, 12080, event_elapsed)                                              \
    ENTRY(cuEventDestroy, 4000, event_destroy)                                                   \
    ENTRY(cuLaunchKernel, 4000, launch)                                                          \
    ENTRY(cuLaunchHostFunc, 10000, launch_host)
