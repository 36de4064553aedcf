// A CUDA runtime without a GPU: the module's own host code runs, and a launch calls the function
// that Python passed to ptx_machine. Linked in place of cudart by tests/ptx/cuda_host.py.
#include <algorithm>
#include <cstddef>
#include <string>
#include <unordered_map>
#include <vector>

struct dim3 {
  unsigned x, y, z;
};
using Launcher = int (*)(const char* kernel, const unsigned* grid_and_block, size_t shared,
                         void** arguments);

namespace {
constexpr int kNoDevice = 100, kFailed = 719;
// the most shared memory of a block on an A100
constexpr int kShared = 166912;
// a block's shared memory without an opt-in, and the largest grid
constexpr size_t kDefaultShared = 48 * 1024;
constexpr unsigned kGridX = 2147483647, kGridYZ = 65535;
constexpr int kInvalid = 1, kDynamicShared = 8;  // cudaFuncAttributeMaxDynamicSharedMemorySize
Launcher launcher = nullptr;
int last = 0;

struct Call {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
std::vector<Call>& calls() {
  static std::vector<Call> stack;
  return stack;
}
std::unordered_map<const void*, size_t>& attributes() {
  static std::unordered_map<const void*, size_t> found;
  return found;
}
std::unordered_map<const void*, std::string>& kernels() {
  static std::unordered_map<const void*, std::string> names;
  return names;
}
}  // namespace

extern "C" {

void ptx_machine(Launcher function) { launcher = function; }

void** __cudaRegisterFatBinary(void* binary) { return new void*(binary); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** handle) { delete handle; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  kernels()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  calls().push_back({grid, block, shared, stream});
  return 0;
}
int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void** stream) {
  const Call call = calls().back();
  calls().pop_back();
  *grid = call.grid;
  *block = call.block;
  *shared = call.shared;
  *stream = call.stream;
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}
int cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                     void*) {
  const size_t threads = size_t{block.x} * block.y * block.z;
  const size_t granted = std::max<size_t>(kDefaultShared, attributes()[kernel]);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > kGridX || grid.y > kGridYZ ||
      grid.z > kGridYZ || threads == 0 || threads > 1024 || block.z > 64 || shared > granted)
    return last = kInvalid;
  const unsigned dims[6] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  const bool known = launcher && kernels().count(kernel);
  last = known ? launcher(kernels()[kernel].c_str(), dims, shared, arguments) : kNoDevice;
  return last ? last = kFailed : 0;
}
int __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                       void* stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

int cudaGetLastError() {
  const int error = last;
  last = 0;
  return error;
}
const char* cudaGetErrorString(int error) {
  return error == kInvalid ? "invalid argument" : "the PTX machine stopped it";
}
int cudaSetDevice(int) { return 0; }
int cudaGetDevice(int* device) { return *device = 0; }
int cudaGetDeviceCount(int* count) { return *count = 0, kNoDevice; }
int cudaGetDeviceProperties(void*, int) { return kNoDevice; }
int cudaDeviceGetAttribute(int* value, int, int) { return *value = kShared, 0; }
int cudaFuncSetAttribute(const void* kernel, int attribute, int value) {
  if (attribute != kDynamicShared || value > kShared) return last = kInvalid;
  attributes()[kernel] = value;
  return 0;
}
}
