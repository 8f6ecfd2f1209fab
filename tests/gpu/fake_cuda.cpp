// A CUDA device for a CPU build of torch, as far as autograd and streams ask for one: nothing is ever computed on it.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::EventFlag;
using c10::Stream;
using c10::StreamId;

constexpr DeviceIndex kDevices = 4;
thread_local DeviceIndex current = 0;
thread_local StreamId streams[kDevices] = {0, 0, 0, 0};
std::atomic<StreamId> made{0};

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device device) const override {
    Device old(DeviceType::CUDA, current);
    uncheckedSetDevice(device);
    return old;
  }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  Stream getStream(Device device) const noexcept override {
    DeviceIndex index = device.index() >= 0 ? device.index() : current;
    return Stream(Stream::UNSAFE, Device(DeviceType::CUDA, index), streams[index]);
  }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device device, int) const override {
    DeviceIndex index = device.index() >= 0 ? device.index() : current;
    return Stream(Stream::UNSAFE, Device(DeviceType::CUDA, index), ++made);
  }
  Stream exchangeStream(Stream stream) const noexcept override {
    Stream old = getStream(stream.device());
    streams[stream.device_index()] = stream.id();
    return old;
  }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Hooks : CUDAHooksInterface {
  explicit Hooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex getCurrentDevice() const override { return current; }
};
using CUDAHooks = Hooks;
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at
