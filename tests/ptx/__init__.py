"""An emulator of PTX on NumPy: compiled kernels are tested where there is no GPU.

    memory = ptx.Memory()
    module = ptx.Module(text)
    stats = module.launch(None, grid=4, block=128, args=[address, n], memory=memory)

It checks what a GPU would not: accesses outside of allocations, misaligned or of bytes never written,
threads that wait for each other, shuffles from threads that take no part, races in shared memory.

What it cannot see is what ptxas does: that may contract a `mul.f32` and an `add.f32` without .rn to a
fused operation. Chunks of blocks run one after the other: a block cannot wait for one of a later chunk.
Of the threads, those with the smallest program counter run: one cannot spin until another has written.
"""

import numpy as np

from .machine import Machine, Stats
from .memory import Memory, PTXError
from .parse import Program

__all__ = ["Memory", "Module", "PTXError", "Stats"]


def triple(value):
    value = tuple(value) if isinstance(value, tuple | list) else (value,)
    return tuple(map(int, (*value, 1, 1, 1)))[:3]


class Module:
    """The kernels of a PTX text. Unknown instructions are errors here, not when they are reached."""

    def __init__(self, text):
        self.text = text
        self.kernels = Program(text).entries
        self.machines = {}
        for kernel in self.kernels.values():
            machine = Machine(kernel, (1, 1, 1), 1)
            for ins in kernel.code:
                machine.decoded(ins)

    def kernel(self, name=None):
        """The entry of that name, or with that in its name; None: the only one."""
        if name in self.kernels:
            return self.kernels[name]
        found = [k for n, k in self.kernels.items() if name is None or name in n]
        if len(found) != 1:
            raise PTXError(f"no single kernel {name!r} among {list(self.kernels)}")
        return found[0]

    @property
    def uses_local(self):
        """Whether a kernel has local memory: arrays of a thread's own that did not fit in registers."""
        return any(kernel.uses_local for kernel in self.kernels.values())

    def launch(
        self,
        name,
        grid,
        block,
        args,
        memory,
        shared=0,
        cluster=1,
        *,
        perturb=0,
        racecheck=False,
        strict=True,
        track=False,
        profile=False,
        lanes=4096,
        limit=10**8,
    ):
        """Run a kernel; returns what it did, as Stats.

        grid, block, cluster: a number or up to three. shared: bytes of dynamic shared memory.
        perturb: a seed for errors of the approximate functions up to their bounds, 0 for none.
        racecheck: look for races in shared memory. strict: loads of bytes never written are errors.
        track: count how often each byte of global memory is read and written. profile: count how often
        each instruction is executed, and conflicts of the banks of shared memory. lanes: about as many
        threads run side by side. limit: of instructions; more are taken for a loop without end.
        """  # fmt: skip
        kernel = self.kernel(name)
        grid, block, cluster = triple(grid), triple(block), triple(cluster)
        self.check(kernel, grid, block, cluster, args)
        stats = Stats()
        total, size = int(np.prod(grid)), int(np.prod(cluster))
        each = max(size, lanes // (-(-int(np.prod(block)) // 32) * 32) // size * size)
        each = min(each, total)
        key = kernel.name, block, each, shared, cluster
        machine = self.machines.pop(key, None) or Machine(kernel, block, each, shared, cluster)
        if machine.shared_bytes > 227 << 10:
            raise PTXError(f"{kernel.name}: {machine.shared_bytes} bytes of shared memory")
        while len(self.machines) > 3:
            del self.machines[next(iter(self.machines))]
        options = {"limit": limit, "perturb": perturb, "racecheck": racecheck, "strict": strict}
        options |= {"track": track, "profile": profile}
        machine.start(memory, arguments(kernel, args), stats, **options)
        for first in range(0, total, each):
            machine.limit = limit
            machine.run(first, grid)
        machine.finish()
        self.machines[key] = machine  # decoding takes longer than a small launch; not after an error
        return stats

    def check(self, kernel, grid, block, cluster, args):
        def refuse(reason):
            raise PTXError(f"{kernel.name}: {reason}")

        if len(args) != len(kernel.params):
            refuse(f"takes {len(kernel.params)} arguments, not {len(args)}")
        if (
            min(grid + block + cluster) < 1
            or max(grid[1:]) > 65535
            or np.prod(block) > 1024
            or block[2] > 64
        ):
            refuse(f"no such launch: grid {grid}, block {block}")
        if any(g % c for g, c in zip(grid, cluster, strict=True)) or np.prod(cluster) > 16:
            refuse(f"grid {grid} is not made of clusters {cluster}")
        limits = kernel.directives
        if "reqntid" in limits and triple(limits["reqntid"]) != block:
            refuse(f"requires blocks of {limits['reqntid']}, not {block}")
        if "maxntid" in limits and np.prod(block) > np.prod(limits["maxntid"]):
            refuse(f"has blocks of at most {limits['maxntid']}, not {block}")
        if "reqnctapercluster" in limits and triple(limits["reqnctapercluster"]) != cluster:
            refuse(f"requires clusters of {limits['reqnctapercluster']}, not {cluster}")


def arguments(kernel, args):
    """The bytes of the parameters."""
    end = max((p.address + p.size for p in kernel.params), default=0)
    out = np.zeros(end, np.uint8)
    for parameter, value in zip(kernel.params, args, strict=True):
        span = out[parameter.address : parameter.address + parameter.size]
        size = int("".join(filter(str.isdigit, parameter.kind))) // 8
        if size != parameter.size:
            data = np.frombuffer(bytes(value), np.uint8)
            if len(data) != parameter.size:
                raise PTXError(f"{parameter.name}: {len(data)} bytes for {parameter.size}")
            span[:] = data
        elif isinstance(value, float | np.floating):
            if parameter.kind[0] in "us":
                raise PTXError(f"{parameter.name}: {value!r} for a .{parameter.kind}")
            span.view(f"f{size}")[0] = value
        elif parameter.kind[0] == "f":
            span.view(f"f{size}")[0] = float(value)
        else:
            span.view(f"u{size}")[0] = int(value) % 256**size
    return out
