"""What NIXL does alone: one process reads another's memory of this machine, through NIXL's C interface and nothing of ours.

Usage: scripts/bench/nixl_raw.py [--bytes N] [--piece-bytes N] [--repeat N]

BATON_NIXL_LIBRARY names NIXL's libnixl_capi.so (scripts/fetch-nixl fetches it); NIXL's plug-in is UCX. The same bytes are
read in one piece (one request of one descriptor), one by one (one request of a descriptor a piece; no two pieces are
neighbours on both sides), and with a request a piece. Requests are posted and asked after by the reading thread. Every byte
is compared after each way. The last line is JSON; GB are 10⁹ bytes, medians of the repetitions.
"""

import argparse
import ctypes
import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import time

DRAM = 0
READ = 0
DONE, IN_PROGRESS = 0, 1
LIMIT_S = 120


class AgentConfig(ctypes.Structure):
    """nixl_capi_agent_config_t."""

    _fields_ = [
        ("progress_thread", ctypes.c_bool),
        ("listen_thread", ctypes.c_bool),
        ("listen_port", ctypes.c_int),
        ("thread_sync", ctypes.c_int),
        ("workers", ctypes.c_uint),
        ("progress_delay_us", ctypes.c_uint64),
        ("listen_delay_us", ctypes.c_uint64),
        ("telemetry", ctypes.c_bool),
    ]


class Nixl:
    """An agent with the plug-in UCX."""

    def __init__(self, name, progress_thread):
        path = os.environ.get("BATON_NIXL_LIBRARY")
        if not path:
            sys.exit("BATON_NIXL_LIBRARY names no NIXL; scripts/fetch-nixl fetches one and prints it")
        self.library = ctypes.CDLL(path)
        config = AgentConfig(progress_thread=progress_thread, workers=1, progress_delay_us=10_000 if progress_thread else 0)
        self.agent = ctypes.c_void_p()
        self.call("create_configured_agent", name.encode(), ctypes.byref(config), ctypes.byref(self.agent))
        memories, params, backend = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        self.call("get_plugin_params", self.agent, b"UCX", ctypes.byref(memories), ctypes.byref(params))
        self.call("create_backend", self.agent, b"UCX", params, ctypes.byref(backend))

    def call(self, name, *arguments):
        status = getattr(self.library, f"nixl_capi_{name}")(*arguments)
        if status not in (DONE, IN_PROGRESS):
            sys.exit(f"NIXL's {name} fails with status {status}")
        return status

    def registered_list(self, ranges):
        listed = ctypes.c_void_p()
        self.call("create_reg_dlist", DRAM, ctypes.byref(listed))
        for start, count in ranges:
            self.call("reg_dlist_add_desc", listed, ctypes.c_size_t(start), ctypes.c_size_t(count), ctypes.c_uint64(0), None,
                      ctypes.c_size_t(0))
        return listed

    def register(self, start, count):
        self.call("register_mem", self.agent, self.registered_list([(start, count)]), None)

    def metadata(self, ranges):
        """How others reach this agent, or its memory."""
        data, length = ctypes.c_void_p(), ctypes.c_size_t()
        self.call("get_local_partial_md", self.agent, self.registered_list(ranges), ctypes.byref(data), ctypes.byref(length), None)
        return ctypes.string_at(data, length.value)

    def load(self, metadata):
        name = ctypes.c_char_p()
        self.call("load_remote_md", self.agent, metadata, ctypes.c_size_t(len(metadata)), ctypes.byref(name))
        return name.value

    def request(self, peer, stretches):
        """A read of (remote address, local address, bytes)."""
        lists = []
        for side in (1, 0):
            listed = ctypes.c_void_p()
            self.call("create_xfer_dlist", DRAM, ctypes.byref(listed))
            for stretch in stretches:
                self.call("xfer_dlist_add_desc", listed, ctypes.c_size_t(stretch[side]), ctypes.c_size_t(stretch[2]), ctypes.c_uint64(0))
            lists.append(listed)
        request = ctypes.c_void_p()
        self.call("create_xfer_req", self.agent, READ, *lists, peer, ctypes.byref(request), None)
        for listed in lists:
            self.call("destroy_xfer_dlist", listed)
        return request

    def carry_out(self, request):
        status = self.call("post_xfer_req", self.agent, request, None)
        deadline = time.monotonic() + LIMIT_S
        while status == IN_PROGRESS or self.call("get_xfer_status", self.agent, request) == IN_PROGRESS:
            status = DONE
            if time.monotonic() > deadline:
                sys.exit(f"a read was not done in {LIMIT_S} s")

    def end(self, request):
        self.call("release_xfer_req", self.agent, request)
        self.call("destroy_xfer_req", request)


def memory(count):
    """Resident memory and where it begins."""
    mapped = mmap.mmap(-1, count)
    for at in range(0, count, mmap.PAGESIZE):
        mapped[at] = 1
    return mapped, ctypes.addressof(ctypes.c_char.from_buffer(mapped))


def content(seed, index, piece_bytes):
    """What a piece of the source holds: no two hold the same."""
    block = random.Random(seed).randbytes(piece_bytes - 8)
    return index.to_bytes(8, "little") + block


def hold(arguments):
    """The process that is read: says where, and stays until its input ends."""
    mapped, start = memory(arguments.bytes)
    block = content(arguments.seed, 0, arguments.piece_bytes)
    for index in range(arguments.bytes // arguments.piece_bytes):
        at = index * arguments.piece_bytes
        mapped[at:at + arguments.piece_bytes] = index.to_bytes(8, "little") + block[8:]
    nixl = Nixl(f"raw-holder-{os.getpid()}", progress_thread=True)
    nixl.register(start, arguments.bytes)
    told = {"start": start, "agent": nixl.metadata([]).hex(), "memory": nixl.metadata([(start, arguments.bytes)]).hex()}
    print(json.dumps(told), flush=True)
    sys.stdin.read()


def verified(mapped, sources, arguments):
    """Compares what was read, piece by piece, and spoils it for the next way."""
    block = content(arguments.seed, 0, arguments.piece_bytes)
    with memoryview(mapped) as view:
        for target, source in enumerate(sources):
            at = target * arguments.piece_bytes
            if view[at:at + 8] != source.to_bytes(8, "little") or view[at + 8:at + arguments.piece_bytes] != block[8:]:
                sys.exit(f"piece {target} is not what was to be read")
            view[at:at + 8] = b"\xa5" * 8


def rate(arguments, read):
    read()
    times = []
    for _ in range(arguments.repeat):
        began = time.perf_counter()
        read()
        times.append(time.perf_counter() - began)
    return arguments.bytes / statistics.median(times) / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=1 << 30)
    parser.add_argument("--piece-bytes", type=int, default=64 << 10)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--hold", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.hold:
        return hold(arguments)
    command = [sys.executable, __file__, "--hold", *(f"--{name}={getattr(arguments, name.replace('-', '_'))}" for name in
                                                    ("bytes", "piece-bytes", "seed"))]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        line = holder.stdout.readline()
        if not line:
            sys.exit(f"the holding process ended with {holder.wait(LIMIT_S)}")
        print(json.dumps(measure(arguments, json.loads(line))), flush=True)
    finally:
        holder.stdin.close()
        try:
            holder.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            holder.kill()
            holder.wait()
    return None


def measure(arguments, holder):
    mapped, local = memory(arguments.bytes)
    nixl = Nixl(f"raw-reader-{os.getpid()}", progress_thread=False)
    nixl.register(local, arguments.bytes)
    peer = nixl.load(bytes.fromhex(holder["agent"]))
    nixl.load(bytes.fromhex(holder["memory"]))
    remote, step = holder["start"], arguments.piece_bytes
    count = arguments.bytes // step
    in_order = list(range(count))
    scattered = in_order.copy()
    random.Random(arguments.seed).shuffle(scattered)
    pieces = [(remote + source * step, local + target * step, step) for target, source in enumerate(scattered)]

    def timed(requests, sources):
        gb_per_s = rate(arguments, lambda: [nixl.carry_out(request) for request in requests])
        for request in requests:
            nixl.end(request)
        verified(mapped, sources, arguments)
        return round(gb_per_s, 4)

    return {
        "one_piece_gb_per_s": timed([nixl.request(peer, [(remote, local, arguments.bytes)])], in_order),
        "one_by_one_gb_per_s": timed([nixl.request(peer, pieces)], scattered),
        "request_a_piece_gb_per_s": timed([nixl.request(peer, [piece]) for piece in pieces], scattered),
    }


if __name__ == "__main__":
    main()
    # NIXL's wheel brings libraries whose exit handlers disturb each other; there is nothing left to do.
    sys.stdout.flush()
    os._exit(0)
