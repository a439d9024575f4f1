// A device named by Python (PrivateUse1): memory of its own that only its kernels may touch, two devices, and every
// operator computed by the processor on copies. What a real device refuses is refused here: operands on different
// devices, float64 (unless allowed), devices that do not exist. It proves where tensors are, not how kernels behave.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>

namespace {

constexpr auto kNpu = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 2;
constexpr int64_t kMemory = int64_t(8) << 30;

struct Counters {
  std::atomic<int64_t> allocated{0}, peak{0};
};
Counters counters[kDevices];
std::atomic<int64_t> items_read{0}, operators_run{0}, streams_made{0};
std::atomic<bool> float64_allowed{false};
thread_local c10::DeviceIndex current = 0;

void require_device(c10::DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < kDevices, "invalid device ordinal ", int(index), ": there are ", int(kDevices));
}

c10::Device resolve(c10::optional<c10::Device> device) {
  c10::Device found = device.value_or(c10::Device(kNpu, current));
  if (!found.has_index()) found = c10::Device(kNpu, current);
  require_device(found.index());
  return found;
}

// ---- memory

struct Block {
  void* data;
  int64_t size;
  c10::DeviceIndex index;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  counters[block->index].allocated -= block->size;
  std::free(block->data);
  delete block;
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto& own = counters[current];
    TORCH_CHECK(own.allocated + int64_t(size) <= kMemory, "out of memory on simulated device ", int(current));
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, 64, std::max<size_t>(size, 64)) == 0, "host memory is exhausted");
    int64_t now = own.allocated += int64_t(size);
    if (now > own.peak) own.peak = now;
    return {data, new Block{data, int64_t(size), current}, &release, c10::Device(kNpu, current)};
  }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};
DeviceAllocator device_allocator;
REGISTER_ALLOCATOR(kNpu, &device_allocator)

std::mutex pinned_lock;
std::map<const char*, size_t> pinned;

void release_pinned(void* data) {
  std::lock_guard<std::mutex> lock(pinned_lock);
  pinned.erase(static_cast<const char*>(data));
  std::free(data);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, 64, std::max<size_t>(size, 64)) == 0, "host memory is exhausted");
    std::lock_guard<std::mutex> lock(pinned_lock);
    pinned[static_cast<const char*>(data)] = size;
    return {data, data, &release_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};
PinnedAllocator pinned_allocator;

// ---- devices, streams, events: everything runs at once, so waiting is never needed

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kNpu; }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before(kNpu, current);
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {kNpu, current}; }
  void setDevice(c10::Device device) const override { current = resolve(device).index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0 && device.index() < kDevices) current = device.index();
  }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, resolve(device)); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return c10::Stream(c10::Stream::UNSAFE, resolve(device), ++streams_made);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    static int recorded;
    *event = &recorded;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

void grow(c10::StorageImpl& storage, size_t size) {
  c10::DeviceGuard guard(storage.device());
  auto data = device_allocator.allocate(size);
  std::memcpy(data.get(), storage.data(), std::min(size, storage.nbytes()));
  storage.set_data_ptr_noswap(std::move(data));
  storage.set_nbytes(size);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(c10::DeviceIndex index) const override { require_device(index), current = index; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    auto before = current;
    setCurrentDevice(index);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return index < 0 ? current : exchangeDevice(index);
  }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> lock(pinned_lock);
    auto next = pinned.upper_bound(static_cast<const char*>(data));
    if (next == pinned.begin()) return false;
    --next;
    return static_cast<const char*>(data) < next->first + std::max<size_t>(next->second, 1);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    grow(*storage.unsafeGetStorageImpl(), size);
  }
};

// ---- kernels that must be the device's own: making, viewing and copying tensors

// The same elements as a tensor of the processor, for the kernels below alone.
at::Tensor host(const at::Tensor& tensor) {
  if (tensor.device().type() != kNpu) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
}

at::Tensor make(c10::IntArrayRef size, c10::optional<c10::IntArrayRef> stride, c10::ScalarType dtype,
                c10::optional<c10::Device> device) {
  TORCH_CHECK_TYPE(dtype != at::kDouble || float64_allowed, "this device has no float64");
  c10::DeviceGuard guard(resolve(device));
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return stride ? at::detail::empty_strided_generic(size, *stride, &device_allocator, keys, dtype)
                : at::detail::empty_generic(size, &device_allocator, keys, dtype, c10::nullopt);
}

at::Tensor empty(c10::IntArrayRef size, c10::optional<c10::ScalarType> dtype, c10::optional<c10::Layout>,
                 c10::optional<c10::Device> device, c10::optional<bool>, c10::optional<c10::MemoryFormat> format) {
  auto tensor = make(size, c10::nullopt, c10::dtype_or_default(dtype), device);
  if (format && *format != c10::MemoryFormat::Contiguous && *format != c10::MemoryFormat::Preserve)
    tensor.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return tensor;
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, c10::optional<c10::ScalarType> dtype,
                         c10::optional<c10::Layout>, c10::optional<c10::Device> device, c10::optional<bool>) {
  return make(size, stride, c10::dtype_or_default(dtype), device);
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      c10::optional<c10::SymInt> offset) {
  auto start = offset ? c10::optional<int64_t>(offset->expect_int()) : c10::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

void ensure(const at::Tensor& tensor, int64_t elements) {
  size_t bytes = size_t(tensor.storage_offset() + elements) * tensor.itemsize();
  if (elements > 0 && bytes > tensor.storage().nbytes()) grow(*tensor.storage().unsafeGetStorageImpl(), bytes);
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, c10::optional<c10::MemoryFormat>) {
  auto plain = C10_AS_INTARRAYREF_SLOW(size);
  if (self.sizes() == plain) return self;
  ensure(self, c10::multiply_integers(plain));
  self.unsafeGetTensorImpl()->set_sizes_contiguous(plain);
  return self;
}

at::Tensor& set_strided(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  auto plain = C10_AS_INTARRAYREF_SLOW(size);
  if (stride.empty() && !plain.empty()) {
    impl->set_storage_offset(offset.expect_int());
    impl->set_sizes_contiguous(plain);
  } else {
    impl->set_sizes_and_strides(plain, C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  }
  return self;
}

at::Tensor& set_whole(at::Tensor& self, at::Storage source) {
  int64_t count = int64_t(source.nbytes() / self.itemsize());
  return set_strided(self, std::move(source), 0, c10::SymIntArrayRef({c10::SymInt(count)}), {});
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  if (to.is_same(self)) return to;
  host(to).copy_(host(self));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (to.sizes() != self.sizes()) to.resize_(self.sizes());
  return copy_from(self, to, false);
}

at::Scalar local_scalar(const at::Tensor& self) {
  ++items_read;
  return at::_local_scalar_dense(host(self));
}

void require_together(const at::Tensor& first, const c10::optional<at::Tensor>& second, const char* op) {
  if (second && second->defined())
    TORCH_CHECK(second->device() == first.device(), op, ": operands on ", first.device(), " and ", second->device());
}

at::Tensor convolve(const at::Tensor& input, const at::Tensor& weight, const c10::optional<at::Tensor>& bias,
                    c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                    bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  require_together(input, weight, "convolution");
  require_together(input, bias, "convolution");
  c10::optional<at::Tensor> plain = bias && bias->defined() ? c10::optional<at::Tensor>(bias->cpu()) : c10::nullopt;
  return at::convolution_symint(input.cpu(), weight.cpu(), plain, stride, padding, dilation, transposed,
                                output_padding, groups).to(input.device());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolve_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> mask) {
  require_together(input, weight, "convolution_backward");
  require_together(input, grad, "convolution_backward");
  std::vector<c10::SymInt> bias_size{weight.sym_size(0)};
  if (transposed) bias_size[0] = weight.sym_size(1) * groups;
  auto [a, b, c] = at::convolution_backward_symint(grad.cpu(), input.cpu(), weight.cpu(),
                                                   c10::SymIntArrayRef(bias_size), stride, padding, dilation,
                                                   transposed, output_padding, groups, mask);
  auto back = [&](const at::Tensor& t) { return t.defined() ? t.to(input.device()) : t; };
  return {back(a), back(b), back(c)};
}

// ---- all other operators

const std::set<std::string> host_indices = {"aten::index", "aten::index_put", "aten::index_put_",
                                            "aten::_index_put_impl_"};

void require_one_device(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  c10::optional<c10::Device> seen;
  bool lenient = host_indices.count(op.schema().name()) > 0;
  auto look = [&](const at::Tensor& tensor, bool index) {
    if (!tensor.defined() || (tensor.is_cpu() && (tensor.dim() == 0 || (index && lenient)))) return;
    if (seen)
      TORCH_CHECK(*seen == tensor.device(), "Expected all tensors to be on the same device, but found at least two, ",
                  *seen, " and ", tensor.device(), ", in ", op.schema().operator_name());
    seen = tensor.device();
  };
  auto arguments = torch::jit::last(stack, op.schema().arguments().size());
  for (const auto& value : arguments) {
    if (value.isTensor()) look(value.toTensor(), false);
    if (value.isTensorList())
      for (const at::Tensor& tensor : value.toTensorList()) look(tensor, false);
    if (value.isOptionalTensorList())
      for (c10::optional<at::Tensor> tensor : value.toOptionalTensorList())
        if (tensor) look(*tensor, true);
  }
}

void on_the_processor(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  require_one_device(op, *stack);
  ++operators_run;
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_processor>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_whole);
  m.impl("set_.source_Storage_storage_offset", &set_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("convolution_overrideable", &convolve);
  m.impl("convolution_backward_overrideable", &convolve_backward);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(baddbmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(mse_loss, fp32)
  KERNEL_PRIVATEUSEONE(cross_entropy_loss, fp32)
}

struct Registration {
  Registration() { at::RegisterPrivateUse1HooksInterface(new Hooks); }
} registration;

}  // namespace

extern "C" {
int npu_current_device() { return current; }
int npu_set_device(int index) { return index < 0 || index >= kDevices ? -1 : (current = c10::DeviceIndex(index), 0); }
int64_t npu_allocated(int index) { return counters[index].allocated; }
int64_t npu_peak(int index) { return counters[index].peak; }
void npu_reset_peak(int index) { counters[index].peak = counters[index].allocated.load(); }
int64_t npu_total() { return kMemory; }
int64_t npu_items_read() { return items_read; }
int64_t npu_operators_run() { return operators_run; }
void npu_allow_float64(int allowed) { float64_allowed = allowed != 0; }
}
