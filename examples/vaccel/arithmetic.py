"""SGEMM, MinMax, the FPGA operations and a Genop by hand, with vAccel's names."""

import struct

from remora.vaccel import Arg, ArgType, OpType, Session


def main() -> None:
    session = Session()
    print("sgemm", session.sgemm(2, 2, 3, 1.0, [1, 2, 3, 4, 5, 6], 3, [1, 0, 0, 1, 1, 1], 2, 0.0, 2))
    data = struct.pack("<6d", 5.0, -1.0, 40.0, 12.0, 7.5, 90.0)
    _out, least, greatest = session.minmax(data, 6, 0, 50)
    print("minmax", least, greatest)
    print("arraycopy", session.fpga_arraycopy([1, 2, 3]))
    print("mmult", session.fpga_mmult([1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 1.0, 0.0]))
    print("parallel", session.fpga_parallel([1.0, 2.0], [3.0, 4.0]))
    print("vadd", session.fpga_vadd([1.0, 2.0], [3.0, 4.0]))
    room = Arg([0, 0, 0], ArgType.INT32_ARRAY)
    session.genop([Arg(OpType.FPGA_ARRAYCOPY, ArgType.UINT8), Arg([7, 8, 9], ArgType.INT32_ARRAY)], [room])
    print("genop", room.buf)


if __name__ == "__main__":
    main()
