"""Have an agent run a function of your own library, if its policy allows that (`exec = true`).

cc -shared -fPIC -o libmytestlib.so examples/vaccel/mytestlib.c
python examples/vaccel/library.py libmytestlib.so
"""

import sys

from remora.vaccel import Arg, ArgType, FFIError, Resource, ResourceType, Session


def main() -> None:
    session = Session()
    try:
        # vAccel's own agent loads paths of its host; Remora's never does.
        session.exec("/usr/lib/libmytestlib.so", "mytestfunc", [10], [bytearray(4)])
    except FFIError as error:
        print("exec", error.code, error.message)
    library = (
        Resource(sys.argv[1], ResourceType.LIB)
        if len(sys.argv) > 1
        else Resource.from_buffer(b"\x7fELF...", ResourceType.LIB)
    )
    library.register(session)
    try:
        print("exec_with_resource", session.exec_with_resource(library, "mytestfunc", [10], [Arg(0, ArgType.INT32)]))
    except FFIError as error:
        print("exec_with_resource", error.code)


if __name__ == "__main__":
    main()
