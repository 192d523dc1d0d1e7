"""The enums of vAccel's protocol as plain integers by name.

Plain, because the guest must not pay for `enum`, and because the wire may carry numbers that nobody here knows. Source:
the .proto files of github.com/nubificus/vaccel-rust (v0.5.0+vaccel.0.8.0), read, not copied.
"""

from __future__ import annotations


class BlobType:
    FILE, BUFFER, MAPPED = range(3)


class ResourceType:
    LIB, DATA, MODEL = range(3)


class ArgType:
    (
        RAW,
        INT8,
        INT8_ARRAY,
        INT16,
        INT16_ARRAY,
        INT32,
        INT32_ARRAY,
        INT64,
        INT64_ARRAY,
        UINT8,
        UINT8_ARRAY,
        UINT16,
        UINT16_ARRAY,
        UINT32,
        UINT32_ARRAY,
        UINT64,
        UINT64_ARRAY,
        FLOAT32,
        FLOAT32_ARRAY,
        FLOAT64,
        FLOAT64_ARRAY,
        BOOL,
        BOOL_ARRAY,
        CHAR,
        CHAR_ARRAY,
        UCHAR,
        UCHAR_ARRAY,
        STRING,
        BUFFER,
        CUSTOM,
    ) = range(30)


class TorchDataType:
    #: BYTE is uint8, CHAR int8, HALF float16, FLOAT float32.
    UNUSED, BYTE, CHAR, SHORT, INT, LONG, HALF, FLOAT = range(8)


class TfDataType:
    (
        UNUSED,
        FLOAT,
        DOUBLE,
        INT32,
        UINT8,
        INT16,
        INT8,
        STRING,
        COMPLEX,  # complex64
        INT64,
        BOOL,
        QINT8,
        QUINT8,
        QINT32,
        BFLOAT16,
        QINT16,
        QUINT16,
        UINT16,
        COMPLEX128,
        HALF,
        RESOURCE,
        VARIANT,
        UINT32,
        UINT64,
    ) = range(24)


class TfliteDataType:
    """As peers send them: TensorFlow Lite's own C numbers, one below those of the .proto file."""

    (
        NOTYPE,
        FLOAT32,
        INT32,
        UINT8,
        INT64,
        STRING,
        BOOL,
        INT16,
        COMPLEX64,
        INT8,
        FLOAT16,
        FLOAT64,
        COMPLEX128,
        UINT64,
        RESOURCE,
        VARIANT,
        UINT32,
        UINT16,
        INT4,
    ) = range(19)


class ErrorType:
    FFI, FFI_WITH_STATUS, INVALID_ARGUMENT, UNINITIALIZED, OUT_OF_BOUNDS, EMPTY_VALUE, CONVERSION_FAILED = range(7)


class OpType:
    """Operations; those that Genop offers are its first argument. Renumbered upstream in 2025."""

    (
        NOOP,
        EXEC,
        EXEC_WITH_RESOURCE,
        IMAGE_CLASSIFY,
        IMAGE_DETECT,
        IMAGE_SEGMENT,
        IMAGE_POSE,
        IMAGE_DEPTH,
        TF_MODEL_LOAD,
        TF_MODEL_UNLOAD,
        TF_MODEL_RUN,
        TFLITE_MODEL_LOAD,
        TFLITE_MODEL_UNLOAD,
        TFLITE_MODEL_RUN,
        TORCH_MODEL_LOAD,
        TORCH_MODEL_RUN,
        TORCH_SGEMM,
        BLAS_SGEMM,
        FPGA_ARRAYCOPY,
        FPGA_MMULT,
        FPGA_PARALLEL,
        FPGA_VECTORADD,
        MINMAX,
        OPENCV,
    ) = range(24)
