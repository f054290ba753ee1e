// Reads the tensors of a decode call in one go: their layouts, as a key to what was found out
// about such calls before, and their addresses. By Python, attribute by attribute, that takes
// several times as long.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace mla {

namespace py = pybind11;

// The part of DLPack's C exchange API that is used here, by its ABI (version 1.x).
namespace dlpack {
struct Version {
    uint32_t major, minor;
};
struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};
struct Device {
    int32_t type, index;
};
struct Tensor {
    char* data;
    Device device;
    int32_t num_dims;
    DataType dtype;
    const int64_t* sizes;
    const int64_t* strides;
    uint64_t byte_offset;
};
struct ExchangeApi {
    Version version;
    ExchangeApi* older;
    void* allocate;
    void* own;
    void* to_python;
    int (*borrow)(void* object, Tensor* tensor);  // 0, or -1 with a Python exception set
    void* current_stream;
};
}  // namespace dlpack

class TensorReader {
  public:
    // `type` is torch.Tensor. Throws std::runtime_error if it has no exchange API to borrow by.
    explicit TensorReader(const py::type& type)
        : type_(reinterpret_cast<PyTypeObject*>(type.ptr())) {
        constexpr const char* kAttribute = "__dlpack_c_exchange_api__";
        if (py::hasattr(type, kAttribute)) {
            const py::object capsule = type.attr(kAttribute);
            const auto* api = static_cast<const dlpack::ExchangeApi*>(
                PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
            if (api == nullptr) throw py::error_already_set();
            if (api->version.major == 1) borrow_ = api->borrow;
        }
        if (borrow_ == nullptr) throw std::runtime_error("tensors have no DLPack 1.x exchange API");
    }

    // (key, addresses) of q and kv_cache, each a tensor or a pair, and of the other tensors, each
    // of which may be None; None if anything else is among them, or more dimensions than any call
    // has. The addresses are those that BoundDecode.enqueue takes.
    py::object read(py::handle q,
                    py::handle kv_cache,
                    py::handle block_table,
                    py::handle cu_seqlens_q,
                    py::handle kv_indptr,
                    py::handle kv_indices,
                    py::handle attn_sink,
                    py::handle out,
                    py::handle lse) const {
        Key key;
        uintptr_t q_at[2], kv_at[2], table, ids, offsets, lists, sink, unused;
        const bool readable = add_wide(key, q, q_at) && add_wide(key, kv_cache, kv_at) &&
                              add(key, block_table, table) && add(key, cu_seqlens_q, offsets) &&
                              add(key, kv_indptr, lists) &&
                              // Its length changes from step to step and decides nothing.
                              add(key, kv_indices, ids, /*with_sizes=*/false) &&
                              add(key, attn_sink, sink) && add(key, out, unused) &&
                              add(key, lse, unused);
        if (!readable) return py::none();
        return py::make_tuple(py::bytes(key.bytes, key.size),
                              py::make_tuple(q_at[0],
                                             q_at[1],
                                             kv_at[0],
                                             kv_at[1],
                                             ids != 0 ? ids : table,
                                             lists,
                                             offsets,
                                             sink));
    }

  private:
    static constexpr int kMaxDims = 4;
    static constexpr int kMaxTensors = 11;
    static constexpr int kTmaBytes = 16;
    static constexpr uintptr_t kRopeOffset = 512 * 2;  // bytes, in a row 576 wide

    struct Key {
        struct Head {
            dlpack::Device device;
            dlpack::DataType dtype;
            int16_t num_dims;
            int16_t misalignment;  // bytes past what the dtype's readers want
        };
        static constexpr int kTensorBytes = 1 + sizeof(Head) + 2 * kMaxDims * sizeof(int64_t);
        char bytes[kMaxTensors * kTensorBytes];
        int size = 0;

        void append(const void* from, int count) {
            std::memcpy(bytes + size, from, count);
            size += count;
        }
        void mark(char what) { bytes[size++] = what; }
    };

    bool add_wide(Key& key, py::handle value, uintptr_t (&addresses)[2]) const {
        if (PyTuple_CheckExact(value.ptr()) && PyTuple_GET_SIZE(value.ptr()) == 2) {
            key.mark('p');
            return add(key, PyTuple_GET_ITEM(value.ptr(), 0), addresses[0]) &&
                   add(key, PyTuple_GET_ITEM(value.ptr(), 1), addresses[1]);
        }
        const bool is_read = add(key, value, addresses[0]);
        addresses[1] = addresses[0] + kRopeOffset;
        return is_read;
    }

    bool add(Key& key, py::handle value, uintptr_t& address, bool with_sizes = true) const {
        address = 0;
        if (value.is_none()) {
            key.mark('n');
            return true;
        }
        if (Py_TYPE(value.ptr()) != type_) return false;
        dlpack::Tensor tensor;
        if (borrow_(value.ptr(), &tensor) != 0) {
            PyErr_Clear();  // whoever reads it in Python finds the words for it
            return false;
        }
        if (tensor.num_dims > kMaxDims) return false;
        address = reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset;
        const int element = tensor.dtype.bits / 8;
        Key::Head head{};
        head.device = tensor.device;
        head.dtype = tensor.dtype;
        head.num_dims = static_cast<int16_t>(tensor.num_dims);
        // The TMA reads and writes what is 16 bits wide; the rest is read element by element.
        head.misalignment = static_cast<int16_t>(address % (element == 2  ? kTmaBytes
                                                            : element > 0 ? element
                                                                          : 1));
        const int bytes = tensor.num_dims * static_cast<int>(sizeof(int64_t));
        key.mark('t');
        key.append(&head, sizeof(head));
        if (with_sizes) key.append(tensor.sizes, bytes);
        key.append(tensor.strides, bytes);
        return true;
    }

    PyTypeObject* type_;  // torch.Tensor lives as long as the module
    int (*borrow_)(void*, dlpack::Tensor*) = nullptr;
};

}  // namespace mla
