"""What the compiler made of the CUDA kernels, read from their machine code; no GPU is needed.

`make cuda-compile` leaves one object a source file in build/cmake/cuda, each with machine code for
every architecture. For each kernel this prints what decides how many of its blocks a multiprocessor
holds, whether registers were spilled, and what its hot loop issues:

    python -m tools.sass                          tables of all kernels
    python -m tools.sass --check                  fails where local memory is used, or where a
                                                  document is out of date
    python -m tools.sass --write                  renews the documents: the tables, and in
                                                  docs/kernels.md what times the counted
                                                  instructions allow on two devices

The loops come from the control-flow graph that the branches of the disassembly make: a loop is a
strongly connected part of it, and what remains of a loop without its header holds the loops inside.
A loop's instructions are counted once an iteration, with those that a branch may skip.
"""
