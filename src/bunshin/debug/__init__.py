"""Looking into a guest from outside: the stub for GDB.

    packets     bytes of the connection to packets and back
    registers   a processor's state as GDB numbers and describes it
    target      a machine as the stub uses it
    stub        commands of the protocol: a packet in, a packet out
    monitor     what `monitor` in GDB's prompt offers
    server      the socket, and the thread that does all of this

Spec: "Debugging with GDB", appendix E, the remote serial protocol. Unknown packets get
an empty answer, as the protocol wants it; those with QEMU's names (`qqemu.PhyMemMode`,
`qqemu.sstep`) mean what they mean there.
"""
