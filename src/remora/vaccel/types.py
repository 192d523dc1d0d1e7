"""vAccel's enums as vaccel-python shows them: members with names, equal to their numbers on the wire."""

from __future__ import annotations

from enum import IntEnum, IntFlag

from remora.wire import vaccel_enums as wire


class PluginType(IntFlag):
    """What kind of plugin a session asks for. This agent chooses by model format and device, and ignores it."""

    CPU = 0x1
    GPU = 0x2
    FPGA = 0x4
    SOFTWARE = 0x8
    TENSORFLOW = 0x10
    TORCH = 0x20
    JETSON = 0x40
    GENERIC = 0x80
    DEBUG = 0x100
    REMOTE = 0x4000
    ALL = 0xFFFF


class ResourceType(IntEnum):
    """What a resource is for."""

    LIB = wire.ResourceType.LIB
    DATA = wire.ResourceType.DATA
    MODEL = wire.ResourceType.MODEL


class ArgType(IntEnum):
    """What an argument of Genop is; it decides the size of numbers in C."""

    RAW = wire.ArgType.RAW
    INT8 = wire.ArgType.INT8
    INT8_ARRAY = wire.ArgType.INT8_ARRAY
    INT16 = wire.ArgType.INT16
    INT16_ARRAY = wire.ArgType.INT16_ARRAY
    INT32 = wire.ArgType.INT32
    INT32_ARRAY = wire.ArgType.INT32_ARRAY
    INT64 = wire.ArgType.INT64
    INT64_ARRAY = wire.ArgType.INT64_ARRAY
    UINT8 = wire.ArgType.UINT8
    UINT8_ARRAY = wire.ArgType.UINT8_ARRAY
    UINT16 = wire.ArgType.UINT16
    UINT16_ARRAY = wire.ArgType.UINT16_ARRAY
    UINT32 = wire.ArgType.UINT32
    UINT32_ARRAY = wire.ArgType.UINT32_ARRAY
    UINT64 = wire.ArgType.UINT64
    UINT64_ARRAY = wire.ArgType.UINT64_ARRAY
    FLOAT32 = wire.ArgType.FLOAT32
    FLOAT32_ARRAY = wire.ArgType.FLOAT32_ARRAY
    FLOAT64 = wire.ArgType.FLOAT64
    FLOAT64_ARRAY = wire.ArgType.FLOAT64_ARRAY
    BOOL = wire.ArgType.BOOL
    BOOL_ARRAY = wire.ArgType.BOOL_ARRAY
    CHAR = wire.ArgType.CHAR
    CHAR_ARRAY = wire.ArgType.CHAR_ARRAY
    UCHAR = wire.ArgType.UCHAR
    UCHAR_ARRAY = wire.ArgType.UCHAR_ARRAY
    STRING = wire.ArgType.STRING
    BUFFER = wire.ArgType.BUFFER
    CUSTOM = wire.ArgType.CUSTOM


class OpType(IntEnum):
    """Operations by their numbers in Genop."""

    NOOP = wire.OpType.NOOP
    EXEC = wire.OpType.EXEC
    EXEC_WITH_RESOURCE = wire.OpType.EXEC_WITH_RESOURCE
    IMAGE_CLASSIFY = wire.OpType.IMAGE_CLASSIFY
    IMAGE_DETECT = wire.OpType.IMAGE_DETECT
    IMAGE_SEGMENT = wire.OpType.IMAGE_SEGMENT
    IMAGE_POSE = wire.OpType.IMAGE_POSE
    IMAGE_DEPTH = wire.OpType.IMAGE_DEPTH
    TF_MODEL_LOAD = wire.OpType.TF_MODEL_LOAD
    TF_MODEL_UNLOAD = wire.OpType.TF_MODEL_UNLOAD
    TF_MODEL_RUN = wire.OpType.TF_MODEL_RUN
    TFLITE_MODEL_LOAD = wire.OpType.TFLITE_MODEL_LOAD
    TFLITE_MODEL_UNLOAD = wire.OpType.TFLITE_MODEL_UNLOAD
    TFLITE_MODEL_RUN = wire.OpType.TFLITE_MODEL_RUN
    TORCH_MODEL_LOAD = wire.OpType.TORCH_MODEL_LOAD
    TORCH_MODEL_RUN = wire.OpType.TORCH_MODEL_RUN
    TORCH_SGEMM = wire.OpType.TORCH_SGEMM
    BLAS_SGEMM = wire.OpType.BLAS_SGEMM
    FPGA_ARRAYCOPY = wire.OpType.FPGA_ARRAYCOPY
    FPGA_MMULT = wire.OpType.FPGA_MMULT
    FPGA_PARALLEL = wire.OpType.FPGA_PARALLEL
    FPGA_VECTORADD = wire.OpType.FPGA_VECTORADD
    MINMAX = wire.OpType.MINMAX
    OPENCV = wire.OpType.OPENCV
