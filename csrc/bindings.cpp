// The Python bindings of the kernels. Tensors arrive as addresses and strides; nothing is owned here, and nothing is
// checked, which sparta_kernels/ops has done. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/products.h"
#include "kernels.h"
#include "philox.h"
#if defined(SPARTA_WITH_CUDA)
#include "cuda/device.h"
#endif

// Runs a kernel at its arguments' place, without the GIL.
#if defined(SPARTA_WITH_CUDA)
#define SPARTA_RUN(kernel, args)    \
  py::gil_scoped_release release;   \
  if (args.place.device < 0)        \
    cpu_kernels().kernel(args);     \
  else                              \
    cuda::kernel(args);
#else
#define SPARTA_RUN(kernel, args)    \
  py::gil_scoped_release release;   \
  cpu_kernels().kernel(args);
#endif

namespace py = pybind11;

namespace sparta {
namespace bindings {
namespace {

using Address = uintptr_t;
using Rows = std::array<int64_t, 3>;   // address, sample stride, row stride
using Small = std::array<int64_t, 2>;  // address, dtype
using Where = std::array<int64_t, 3>;  // threads, device, stream

void* pointer(int64_t address) { return reinterpret_cast<void*>(static_cast<Address>(address)); }
Matrices matrices(const Rows& p) { return {pointer(p[0]), p[1], p[2]}; }
Place place(const Where& w) { return {static_cast<int>(w[0]), static_cast<int>(w[1]), pointer(w[2])}; }
Dense dense(const Small& s) { return {pointer(s[0]), static_cast<DType>(s[1])}; }

GateShape gate_shape(const std::array<int64_t, 5>& s, bool planar) { return {s[0], s[1], s[2], s[3], s[4], planar}; }

void gate_forward(const std::array<int64_t, 5>& shape, bool planar, int dtype, const Rows& x, const Rows& y,
                  const Small& spatial, const Small& channel, const Small& kernel, const Where& where) {
  const GateForward args{gate_shape(shape, planar), static_cast<DType>(dtype), matrices(x), matrices(y), dense(spatial),
                         dense(channel), dense(kernel), place(where)};
  SPARTA_RUN(gate_forward, args)
}

void gate_backward(const std::array<int64_t, 5>& shape, bool planar, int dtype, const Rows& x, const Rows& gy,
                   const Rows& gx, const Rows& gy2, const Small& spatial, const Small& channel, const Small& kernel,
                   const Small& grad_spatial, const Small& grad_channel, const Small& grad_kernel, Address scratch,
                   const Where& where) {
  const GateBackward args{gate_shape(shape, planar), static_cast<DType>(dtype), matrices(x), matrices(gy), matrices(gx),
                          matrices(gy2), dense(spatial), dense(channel), dense(kernel), dense(grad_spatial), dense(grad_channel),
                          dense(grad_kernel), pointer(scratch), place(where)};
  SPARTA_RUN(gate_backward, args)
}

void conv_forward(const std::array<int64_t, 4>& shape, const Small& spatial, const Small& kernel, const Small& output,
                  const Where& where) {
  const ConvForward args{{shape[0], shape[1], shape[2], shape[3]}, dense(spatial), dense(kernel), dense(output),
                         place(where)};
  SPARTA_RUN(conv_forward, args)
}

void conv_backward(const std::array<int64_t, 4>& shape, const Small& grad_output, const Small& spatial,
                   const Small& kernel, const Small& grad_spatial, const Small& grad_kernel, const Where& where) {
  const ConvBackward args{{shape[0], shape[1], shape[2], shape[3]},
                          dense(grad_output), dense(spatial), dense(kernel), dense(grad_spatial), dense(grad_kernel),
                          place(where)};
  SPARTA_RUN(conv_backward, args)
}

void pgd_step(int64_t elements, int dtype, Address adv, Address grad, Address clean, double signed_step, double eps,
              double lower, double upper, const Where& where) {
  const PgdStep args{elements, static_cast<DType>(dtype), pointer(adv), pointer(grad), pointer(clean), signed_step,
                     eps, lower, upper, place(where)};
  SPARTA_RUN(pgd_step, args)
}

void pgd_start(const std::array<int64_t, 4>& shape, const std::array<int64_t, 4>& strides, int dtype, Address adv,
               Address clean, Address index, uint64_t seed, uint32_t restart, double eps, double lower, double upper,
               const Where& where) {
  const PgdStart args{shape[0], shape[1], shape[2], shape[3], static_cast<DType>(dtype), pointer(adv), pointer(clean),
                      {strides[0], strides[1], strides[2], strides[3]}, static_cast<const int64_t*>(pointer(index)),
                      seed, restart, eps, lower, upper, place(where)};
  SPARTA_RUN(pgd_start, args)
}

void relu_forward(int64_t elements, int dtype, Address a, Address b, Address y, Address bits, const Where& where) {
  const ReluForward args{elements, static_cast<DType>(dtype), pointer(a), pointer(b), pointer(y),
                         static_cast<uint8_t*>(pointer(bits)), place(where)};
  SPARTA_RUN(relu_forward, args)
}

void relu_backward(int64_t elements, int dtype, Address grad, Address grad2, Address bits, Address gx,
                   const Where& where) {
  const ReluBackward args{elements, static_cast<DType>(dtype), pointer(grad), pointer(grad2),
                          static_cast<const uint8_t*>(pointer(bits)), pointer(gx), place(where)};
  SPARTA_RUN(relu_backward, args)
}

void swish_relu_forward(int64_t elements, int dtype, Address x, Address y, const Where& where) {
  const SwishReluForward args{elements, static_cast<DType>(dtype), pointer(x), pointer(y), place(where)};
  SPARTA_RUN(swish_relu_forward, args)
}

void swish_relu_backward(int64_t elements, int dtype, Address gy, Address x, Address gx, const Where& where) {
  const SwishReluBackward args{elements, static_cast<DType>(dtype), pointer(gy), pointer(x), pointer(gx), place(where)};
  SPARTA_RUN(swish_relu_backward, args)
}

void smooth_relu_forward(int64_t elements, int dtype, Address x, Address y, const Small& b, const Where& where) {
  const SmoothReluForward args{elements, static_cast<DType>(dtype), pointer(x), pointer(y), dense(b), place(where)};
  SPARTA_RUN(smooth_relu_forward, args)
}

void smooth_relu_backward(int64_t elements, int dtype, Address gy, Address x, Address gx, const Small& b,
                          const Small& grad_b, Address scratch, const Where& where) {
  const SmoothReluBackward args{elements, static_cast<DType>(dtype), pointer(gy), pointer(x), pointer(gx), dense(b),
                                dense(grad_b), pointer(scratch), place(where)};
  SPARTA_RUN(smooth_relu_backward, args)
}

DyReluShape dyrelu_shape(const std::array<int64_t, 4>& s, bool planar) { return {s[0], s[1], s[2], s[3], planar}; }

void dyrelu_forward(const std::array<int64_t, 4>& shape, bool planar, int dtype, const Rows& x, const Rows& y,
                    const Small& slopes, const Small& intercepts, const Where& where) {
  const DyReluForward args{dyrelu_shape(shape, planar), static_cast<DType>(dtype), matrices(x), matrices(y),
                           dense(slopes), dense(intercepts), place(where)};
  SPARTA_RUN(dyrelu_forward, args)
}

void dyrelu_backward(const std::array<int64_t, 4>& shape, bool planar, int dtype, const Rows& gy, const Rows& x,
                     const Rows& gx, const Small& slopes, const Small& intercepts, const Small& grad_slopes,
                     const Small& grad_intercepts, Address scratch, const Where& where) {
  const DyReluBackward args{dyrelu_shape(shape, planar), static_cast<DType>(dtype), matrices(gy), matrices(x),
                            matrices(gx), dense(slopes), dense(intercepts), dense(grad_slopes), dense(grad_intercepts),
                            pointer(scratch), place(where)};
  SPARTA_RUN(dyrelu_backward, args)
}

using Extents = std::array<int64_t, 5>;  // samples, channels, pixels, hidden (padded), spare
template <size_t count>
using Addresses = std::array<Address, count>;

AttentionShape attention_shape(const Extents& s, bool planar, bool dynamic) {
  return {s[0], s[1], s[2], s[3], s[4], planar, dynamic};
}

void attention_forward(const Extents& shape, bool planar, bool dynamic, int dtype, int product, const Rows& x,
                       const Rows& skip, const Addresses<8>& weights, const Addresses<6>& written, const Where& where) {
  const auto weight = [&](int i) { return pointer(weights[i]); };
  const auto result = [&](int i) { return pointer(written[i]); };
  const AttentionForward args{attention_shape(shape, planar, dynamic), static_cast<DType>(dtype),
                              static_cast<DType>(product), matrices(x), matrices(skip), weight(0), weight(1), weight(2),
                              weight(3), weight(4), weight(5), weight(6), weight(7), result(0), result(1), result(2),
                              result(3), result(4), static_cast<uint16_t*>(result(5)), place(where)};
  py::gil_scoped_release release;
  cpu_kernels().attention_forward(args);
}

void attention_backward(const Extents& shape, bool planar, bool dynamic, int dtype, int product, const Rows& gx,
                        const Addresses<5>& weights, const Addresses<3>& gradients, Address bits, const Where& where) {
  const auto weight = [&](int i) { return pointer(weights[i]); };
  const auto gradient = [&](int i) { return pointer(gradients[i]); };
  const AttentionBackward args{attention_shape(shape, planar, dynamic), static_cast<DType>(dtype),
                               static_cast<DType>(product), matrices(gx), weight(0), weight(1), weight(2), weight(3),
                               weight(4), gradient(0), gradient(1), gradient(2),
                               static_cast<const uint16_t*>(pointer(bits)), place(where)};
  py::gil_scoped_release release;
  cpu_kernels().attention_backward(args);
}

// Sets the addresses of a library's products: float32, bfloat16, release, float64 (cpu/products.h); 0 for a missing one.
void set_products(const Addresses<4>& at) {
  ProductFunctions functions;
  functions.float32 = reinterpret_cast<ProductFunctions::Float32>(at[0]);
  functions.bfloat16 = reinterpret_cast<ProductFunctions::Bfloat16>(at[1]);
  functions.release = reinterpret_cast<ProductFunctions::Release>(at[2]);
  functions.float64 = reinterpret_cast<ProductFunctions::Float64>(at[3]);
  sparta::set_products(functions);
}

// C = A B as the kernels compute it, of gapless matrices of m x k and k x n; throws what the library throws.
void multiply(int dtype, int64_t m, int64_t n, int64_t k, Address a, Address b, Address c) {
  Products products;
  const auto run = [&](auto type, auto acc) {
    products.multiply(m, n, k, static_cast<const decltype(type)*>(pointer(a)), k,
                      static_cast<const decltype(type)*>(pointer(b)), n, static_cast<decltype(acc)*>(pointer(c)), n);
  };
  switch (static_cast<DType>(dtype)) {
    case DType::float64: run(double{}, double{}); break;
    case DType::bfloat16: run(bfloat16{}, float{}); break;
    default: run(float{}, float{});
  }
  products.release();
  products.check();
}

#if defined(SPARTA_WITH_CUDA)
// Bytes of scratch memory that the caller of a CUDA kernel has to allocate. CPU kernels allocate their own.
int64_t gate_backward_scratch(const std::array<int64_t, 5>& shape, bool planar, int dtype, const Rows& x,
                              const Rows& gy, const Rows& gx) {
  return cuda::gate_backward_scratch(gate_shape(shape, planar), static_cast<DType>(dtype), matrices(x), matrices(gy),
                                     matrices(gx));
}

int64_t smooth_relu_backward_scratch(int64_t elements, int dtype) {
  return cuda::smooth_relu_backward_scratch(elements, static_cast<DType>(dtype));
}

int64_t dyrelu_backward_scratch(const std::array<int64_t, 4>& shape, bool planar, int dtype, const Rows& gy,
                                const Rows& x, const Rows& gx) {
  return cuda::dyrelu_backward_scratch(dyrelu_shape(shape, planar), static_cast<DType>(dtype), matrices(gy),
                                       matrices(x), matrices(gx));
}
#endif

// Initialises the CUDA driver. From then on the process cannot hide devices any more (CUDA_VISIBLE_DEVICES), and its
// forked children cannot use them.
py::dict cuda_info() {
  py::dict info;
#if defined(SPARTA_WITH_CUDA)
  const cuda::Versions versions = cuda::versions();
  py::list devices;
  for (const cuda::Device& device : cuda::devices()) {
    py::dict entry;
    entry["name"] = device.name;
    entry["capability"] = py::make_tuple(device.major, device.minor);
    entry["multiprocessors"] = device.multiprocessors;
    entry["memory_bytes"] = device.memory;
    devices.append(entry);
  }
  info["built"] = true;
  info["archs"] = SPARTA_CUDA_ARCHS;
  info["runtime_version"] = versions.runtime;
  info["driver_version"] = versions.driver;
  info["devices"] = devices;
#else
  info["built"] = false;
#endif
  return info;
}

}  // namespace
}  // namespace bindings
}  // namespace sparta

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of sparta_kernels. Internal: call sparta_kernels' operations instead.";
  m.attr("compiler") = SPARTA_COMPILER;
#if defined(SPARTA_WITH_CUDA)
  m.attr("with_cuda") = true;
  m.def("gate_backward_scratch", &sparta::bindings::gate_backward_scratch);
  m.def("smooth_relu_backward_scratch", &sparta::bindings::smooth_relu_backward_scratch);
  m.def("dyrelu_backward_scratch", &sparta::bindings::dyrelu_backward_scratch);
#else
  m.attr("with_cuda") = false;
#endif
  m.def("gate_forward", &sparta::bindings::gate_forward);
  m.def("gate_backward", &sparta::bindings::gate_backward);
  m.def("conv_forward", &sparta::bindings::conv_forward);
  m.def("conv_backward", &sparta::bindings::conv_backward);
  m.def("pgd_step", &sparta::bindings::pgd_step);
  m.def("pgd_start", &sparta::bindings::pgd_start);
  m.def("relu_forward", &sparta::bindings::relu_forward);
  m.def("relu_backward", &sparta::bindings::relu_backward);
  m.def("swish_relu_forward", &sparta::bindings::swish_relu_forward);
  m.def("swish_relu_backward", &sparta::bindings::swish_relu_backward);
  m.def("smooth_relu_forward", &sparta::bindings::smooth_relu_forward);
  m.def("smooth_relu_backward", &sparta::bindings::smooth_relu_backward);
  m.def("dyrelu_forward", &sparta::bindings::dyrelu_forward);
  m.def("dyrelu_backward", &sparta::bindings::dyrelu_backward);
  m.def("attention_forward", &sparta::bindings::attention_forward);
  m.def("attention_backward", &sparta::bindings::attention_backward);
  m.def("set_products", &sparta::bindings::set_products);
  m.def("multiply", &sparta::bindings::multiply);
  m.def("philox4x32", [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    const sparta::PhiloxWords words = sparta::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
    return std::array<uint32_t, 4>{words.word[0], words.word[1], words.word[2], words.word[3]};
  });
  m.def("isa", [] { return std::string(sparta::cpu_kernels().isa); });
  m.def("built_isas", &sparta::built_isas);
  m.def("supported_isas", &sparta::supported_isas);
  m.def("set_isa", &sparta::set_isa);
  m.def("cuda_info", &sparta::bindings::cuda_info);
  m.def("malloc_is_glibc", &sparta::malloc_is_glibc);
  m.def("keep_freed_memory", &sparta::keep_freed_memory, py::call_guard<py::gil_scoped_release>());
  m.def("return_freed_memory", &sparta::return_freed_memory, py::call_guard<py::gil_scoped_release>());
}
