"""Standard library modules that PID 1's own interpreter gets in a smaller form (only on the guest OS disk).

`socket` and `signal` turn hundreds of constants into enumerations when they are imported, which costs an emulated guest
80 ms before it can do anything. PID 1 needs the plain numbers. Nothing else ever sees these modules: functions run in
their image's own Python.
"""
