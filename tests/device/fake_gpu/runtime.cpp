// A CUDA runtime without a GPU, for tests: preloaded, it takes the calls that torch makes of libcudart, and
// the few of libcuda. There are two devices, whose memory is the host's. What is queued is done before the
// call returns.
//
// It shows which calls are made, in which thread, for which device; which devices have a context; and what
// becomes of a call that fails. It does not show what comes too early or too late (late_streams.py does), and
// runs no kernels: those of torch are operators.py's, those of this project their emulation's.
//
// Errors are CUDA's: one stays with its thread until `cudaGetLastError` takes it.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#define ANSWER extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kDevices = 2;
constexpr std::size_t kMemory = std::size_t{80} << 30;  // of each device
constexpr int kSharedOfABlock = 232448;                 // of compute capability 9.0

enum class Place { kDevice, kAllocated, kRegistered };

struct Range {
  std::size_t size;
  Place place;
  int device;
};

struct Queue {  // a stream or an event
  int device;
};

struct Failure {
  std::string name;  // none: nothing fails
  int countdown = 0;
  bool where_expected = false;
};

struct State {
  std::mutex mutex;
  std::map<std::string, int> calls;
  std::set<int> contexts;
  std::map<std::uintptr_t, Range> memory;
  std::size_t limit = kMemory;  // what tests leave of it
  Failure failure;
  bool failed = false;  // the last failure that was asked for
};

State& state() {
  static auto* const only = new State;  // threads outlive `main`
  return *only;
}

thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;
thread_local bool expecting = false;

cudaError_t answer(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

// A call that needs no context.
cudaError_t note(const char* name) {
  State& all = state();
  const std::lock_guard lock(all.mutex);
  ++all.calls[name];
  const bool counts = all.failure.name == name && (expecting || !all.failure.where_expected);
  if (counts && --all.failure.countdown == 0) {
    all.failed = true;
    return answer(cudaErrorMemoryAllocation);
  }
  return cudaSuccess;
}

// A call that makes the current device's context where there is none.
cudaError_t enter(const char* name) {
  {
    const std::lock_guard lock(state().mutex);
    state().contexts.insert(current);
  }
  return note(name);
}

template <class Work>
cudaError_t then(cudaError_t error, Work work) {
  return error != cudaSuccess ? error : work();
}

const Range* find(const void* address) {  // with the mutex
  auto& memory = state().memory;
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  auto after = memory.upper_bound(at);
  if (after == memory.begin()) return nullptr;
  const auto& [begin, range] = *std::prev(after);
  return at < begin + range.size ? &range : nullptr;
}

std::size_t count_free() {
  const std::lock_guard lock(state().mutex);
  std::size_t used = 0;
  for (const auto& [begin, range] : state().memory) {
    if (range.place == Place::kDevice && range.device == current) used += range.size;
  }
  return state().limit - std::min(used, state().limit);
}

bool is_on_device(const void* address, std::size_t size) {
  const std::lock_guard lock(state().mutex);
  const Range* range = find(address);
  return range != nullptr && range->place == Place::kDevice &&
         (size == 0 || find(static_cast<const char*>(address) + size - 1) == range);
}

void add(const void* address, Range range) {
  const std::lock_guard lock(state().mutex);
  auto& memory = state().memory;
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  memory.erase(memory.lower_bound(at), memory.lower_bound(at + range.size));  // unmapped while page-locked
  memory[at] = range;
}

bool remove(const void* address, Place place) {
  const std::lock_guard lock(state().mutex);
  const auto found = state().memory.find(reinterpret_cast<std::uintptr_t>(address));
  if (found == state().memory.end() || found->second.place != place) return false;
  state().memory.erase(found);
  return true;
}

cudaError_t allocate(void** address, std::size_t size, Place place) {
  constexpr std::size_t kAlignment = 4096;
  if (place == Place::kDevice && size > count_free()) return answer(cudaErrorMemoryAllocation);
  *address = std::aligned_alloc(kAlignment, (size + kAlignment - 1) / kAlignment * kAlignment);
  if (*address == nullptr) return answer(cudaErrorMemoryAllocation);
  std::memset(*address, 0xA5, std::min(size, std::size_t{1} << 20));  // nobody expects anything of it
  add(*address, {size, place, current});
  return cudaSuccess;
}

cudaError_t release(void* address, Place place) {
  if (address == nullptr) return cudaSuccess;
  if (!remove(address, place)) return answer(cudaErrorInvalidValue);
  std::free(address);
  return cudaSuccess;
}

cudaError_t copy(void* to, const void* from, std::size_t size, cudaMemcpyKind kind) {
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if ((to_device && !is_on_device(to, size)) || (from_device && !is_on_device(from, size))) {
    return answer(cudaErrorInvalidValue);
  }
  std::memmove(to, from, size);
  return cudaSuccess;
}

template <class Handle>
cudaError_t make(Handle* handle) {
  *handle = reinterpret_cast<Handle>(new Queue{current});
  return cudaSuccess;
}

template <class Handle>
cudaError_t end(Handle handle) {
  delete reinterpret_cast<Queue*>(handle);
  return cudaSuccess;
}

template <class Handle>
int device_of(Handle handle) {
  return handle == nullptr ? current : reinterpret_cast<const Queue*>(handle)->device;
}

cudaError_t record(cudaEvent_t event, cudaStream_t stream) {
  return device_of(event) == device_of(stream) ? cudaSuccess : answer(cudaErrorInvalidResourceHandle);
}

cudaError_t not_capturing(cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

}  // namespace

// What tests ask and say.

ANSWER int fake_calls(const char* name) {
  const std::lock_guard lock(state().mutex);
  return state().calls[name];
}

ANSWER int fake_has_context(int device) {
  const std::lock_guard lock(state().mutex);
  return state().contexts.contains(device);
}

ANSWER void fake_limit_memory(std::size_t bytes) {
  const std::lock_guard lock(state().mutex);
  state().limit = bytes;
}

// The nth call of this name from now on fails, once, in whichever thread; no name: none does.
// `where_expected`: only calls count during which their thread expects failures.
ANSWER void fake_fail(const char* name, int nth, bool where_expected) {
  const std::lock_guard lock(state().mutex);
  state().failure = {name, nth, where_expected};
  if (nth > 0) state().failed = false;
}

ANSWER void fake_expect_failures(bool expect) { expecting = expect; }

ANSWER int fake_failed() {
  const std::lock_guard lock(state().mutex);
  return state().failed;
}

// A kernel that somebody else runs is queued on `stream`; answers what the check behind a launch finds.
ANSWER int fake_launch(cudaStream_t stream) {
  enter("cudaLaunchKernel");
  if (device_of(stream) != current) answer(cudaErrorInvalidResourceHandle);
  return std::exchange(last, cudaSuccess);
}

// The runtime.

ANSWER cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return note(__func__);
}

ANSWER cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return note(__func__);
}

ANSWER cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return answer(cudaErrorInvalidDevice);
  current = device;
  return enter(__func__);
}

ANSWER cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return note(__func__);
}

ANSWER cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "no GPU, but its runtime's fake");
  properties->major = 9;
  properties->totalGlobalMem = kMemory;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->regsPerMultiprocessor = 65536;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = kSharedOfABlock;
  return note(__func__);
}

ANSWER cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? 132
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? kSharedOfABlock
                                                                  : 0;
  return note(__func__);
}

ANSWER cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return note(__func__);
}

ANSWER cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *free = count_free();
  *total = kMemory;
  return enter(__func__);
}

ANSWER cudaError_t cudaMalloc(void** address, std::size_t size) {
  return then(enter(__func__), [&] { return allocate(address, size, Place::kDevice); });
}

ANSWER cudaError_t cudaFree(void* address) {
  return then(enter(__func__), [&] { return release(address, Place::kDevice); });
}

ANSWER cudaError_t cudaHostAlloc(void** address, std::size_t size, unsigned) {
  return then(enter(__func__), [&] { return allocate(address, size, Place::kAllocated); });
}

ANSWER cudaError_t cudaFreeHost(void* address) {
  return then(enter(__func__), [&] { return release(address, Place::kAllocated); });
}

ANSWER cudaError_t cudaHostRegister(void* address, std::size_t size, unsigned) {
  if (const cudaError_t error = enter(__func__); error != cudaSuccess) return error;
  {
    const std::lock_guard lock(state().mutex);
    if (find(address) != nullptr) return answer(cudaErrorHostMemoryAlreadyRegistered);
  }
  add(address, {size, Place::kRegistered, current});
  return cudaSuccess;
}

ANSWER cudaError_t cudaHostUnregister(void* address) {
  if (const cudaError_t error = enter(__func__); error != cudaSuccess) return error;
  return remove(address, Place::kRegistered) ? cudaSuccess : answer(cudaErrorHostMemoryNotRegistered);
}

ANSWER cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  if (const cudaError_t error = enter(__func__); error != cudaSuccess) return error;
  const std::lock_guard lock(state().mutex);
  const Range* range = find(address);
  *attributes = {};
  attributes->type = range == nullptr                 ? cudaMemoryTypeUnregistered
                     : range->place == Place::kDevice ? cudaMemoryTypeDevice
                                                      : cudaMemoryTypeHost;
  attributes->device = range == nullptr ? -2 : range->device;
  return cudaSuccess;
}

ANSWER cudaError_t cudaMemcpy(void* to, const void* from, std::size_t size, cudaMemcpyKind kind) {
  return then(enter(__func__), [&] { return copy(to, from, size, kind); });
}

ANSWER cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t size, cudaMemcpyKind kind,
                                   cudaStream_t) {
  return then(enter(__func__), [&] { return copy(to, from, size, kind); });
}

ANSWER cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return enter(__func__);
}

ANSWER cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return then(enter(__func__), [&] { return make(stream); });
}

ANSWER cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return enter(__func__);
}

ANSWER cudaError_t cudaStreamSynchronize(cudaStream_t) { return enter(__func__); }
ANSWER cudaError_t cudaStreamQuery(cudaStream_t) { return enter(__func__); }
ANSWER cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return enter(__func__); }

ANSWER cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return then(note(__func__), [&] { return not_capturing(status); });
}

ANSWER cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                            unsigned long long*, cudaGraph_t*, const cudaGraphNode_t**,
                                            const cudaGraphEdgeData**, std::size_t*) {
  return then(note(__func__), [&] { return not_capturing(status); });
}

ANSWER cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return note(__func__); }

ANSWER cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return then(enter(__func__), [&] { return make(event); });
}

ANSWER cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return then(enter(__func__), [&] { return end(event); });
}

ANSWER cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return then(enter(__func__), [&] { return record(event, stream); });
}

ANSWER cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return then(enter(__func__), [&] { return record(event, stream); });
}

ANSWER cudaError_t cudaEventQuery(cudaEvent_t) { return enter(__func__); }
ANSWER cudaError_t cudaEventSynchronize(cudaEvent_t) { return enter(__func__); }

ANSWER cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }
ANSWER cudaError_t cudaPeekAtLastError() { return last; }
ANSWER const char* cudaGetErrorName(cudaError_t) { return "an error of the fake runtime"; }

ANSWER const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation        ? "out of memory"
         : error == cudaErrorInvalidResourceHandle ? "invalid resource handle"
                                                   : "an error of the fake runtime";
}

ANSWER cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, std::size_t, cudaStream_t) {
  std::fputs("a kernel is launched that nobody runs: operators.py is to know the operator\n", stderr);
  std::abort();
}

// The driver, of which torch asks whether a device has a context; the rest is there to be linked.

ANSWER int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  *flags = 0;
  *active = fake_has_context(device);
  return 0;
}

// clang-format off
#define ABSENT(name) ANSWER int name() { return cudaErrorNotSupported; }
ABSENT(cuCtxGetCurrent) ABSENT(cuCtxSetCurrent) ABSENT(cuDeviceGet)
ABSENT(cuDeviceGetAttribute) ABSENT(cuDevicePrimaryCtxRetain) ABSENT(cuFuncGetAttribute)
ABSENT(cuFuncSetAttribute) ABSENT(cuFuncSetCacheConfig) ABSENT(cuGetErrorString)
ABSENT(cuLaunchCooperativeKernel) ABSENT(cuLaunchKernel) ABSENT(cuLinkAddData_v2)
ABSENT(cuLinkComplete) ABSENT(cuLinkCreate_v2) ABSENT(cuModuleGetFunction)
ABSENT(cuModuleLoad) ABSENT(cuModuleLoadData) ABSENT(cuModuleLoadDataEx)
ABSENT(cuModuleUnload) ABSENT(cuOccupancyMaxActiveBlocksPerMultiprocessor) ABSENT(cuPointerGetAttribute)
ABSENT(cuTensorMapEncodeTiled)
    // clang-format on

    ANSWER cudaError_t
    cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                     cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(symbol, "cuDevicePrimaryCtxGetState") == 0;
  *function =
      known ? reinterpret_cast<void*>(cuDevicePrimaryCtxGetState) : reinterpret_cast<void*>(cuDeviceGet);
  if (result != nullptr) *result = cudaDriverEntryPointSuccess;
  return note(__func__);
}
