"""Ask an agent to run a library. Remora's agent refuses, and this shows how a program sees that."""

from remora.vaccel import FFIError, Resource, ResourceType, Session


def main() -> None:
    session = Session()
    try:
        session.exec("/usr/lib/libmytestlib.so", "mytestfunc", [10], [bytearray(4)])
    except FFIError as error:
        print("exec", error.code, error.message)
    library = Resource.from_buffer(b"\x7fELF...", ResourceType.LIB)
    library.register(session)
    try:
        session.exec_with_resource(library, "mytestfunc", [10], [bytearray(4)])
    except FFIError as error:
        print("exec_with_resource", error.code)


if __name__ == "__main__":
    main()
