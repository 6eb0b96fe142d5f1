"""KV hand-off between two processes of this machine, beside what its parts do alone, in one run.

Usage: scripts/bench-kv [--tokens N] [--repeat N] [--rounds N] [--transport LIST] [--nixl-raw COMMAND]

Ours: `baton bench kv` of a Llama-3.1-8B request (8,192 tokens are 1 GiB), in scattered 64 KiB pieces and in whole blocks of
32 tokens, every byte compared, with checksums and (not for the targets) without, which gives what they cost. Beside it: copies
between two buffers (by `baton bench kv` itself), UCX's own ucp_put_bw at 64 MiB over the same UCX_TLS, iperf3 with one
stream, and NIXL alone: scripts/bench/nixl_raw.py where BATON_NIXL_LIBRARY names NIXL, or the command of --nixl-raw, whose last
line is JSON with one_piece_gb_per_s and one_by_one_gb_per_s. References and our cases alternate, round by round; medians are
compared. GB are 10⁹ bytes.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import time

import common

PIECE = 64 << 10
WITHOUT = " without checksums"
PUT_BYTES = 64 << 20
LIMIT_S = 120


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--repeat", type=int, default=5, help="timed transfers a case and round")
    parser.add_argument("--rounds", type=int, default=3, help="times that everything is run")
    parser.add_argument("--transport", default="all")
    parser.add_argument("--seconds", type=int, default=5, help="of iperf3")
    own = shlex.join([sys.executable, str(common.ROOT / "scripts" / "bench" / "nixl_raw.py")])
    parser.add_argument("--nixl-raw", default=own if os.environ.get("BATON_NIXL_LIBRARY") else "")
    arguments = parser.parse_args()
    load = {"before": os.getloadavg()}
    references, cases = measure(arguments)
    load["after"] = os.getloadavg()
    table, met = compare(references, cases)
    common.keep("kv", {"tokens": arguments.tokens, "shape": arguments.shape, "ucx_tls": os.environ.get("UCX_TLS"),
                       "load_average": load, "references": references, "cases": cases, "targets": table})
    sys.exit(0 if met else 1)


def measure(arguments):
    """All references and all of our cases, alternating; each a list with one figure a round."""
    references, cases = {}, {}

    def refer(name, gb_per_s):
        if gb_per_s is not None:
            references.setdefault(name, []).append(gb_per_s)

    for turn in range(arguments.rounds):
        refer("iperf3", iperf3(arguments.seconds))
        refer("ucp_put_bw", put_bandwidth())
        for name, gb_per_s in raw_nixl(arguments.nixl_raw).items():
            refer(name, gb_per_s)
        for cut, options in (("pieces", ["--piece-bytes", str(PIECE)]), ("blocks", ["--tokens-per-block", "32"])):
            report = ours(arguments, options)
            for reference in report["references"]:
                refer(f"{reference['name']}-{reference['threads']}", reference["gb_per_s"])
            for case in report["results"]:
                if case["status"] != "PASS":
                    sys.exit(f"{case['transport']} in {cut}: {case['status']}: {case['detail']}")
                name = f"{case['transport']}/{cut}" + ("" if case["checksums"] else WITHOUT)
                cases.setdefault(name, []).append({"wire": case["wire"], **case["figures"]})
            for skipped in report["skipped"] if turn == 0 and cut == "pieces" else []:
                print(f"{skipped['transport']} is not there: {skipped['reason'].splitlines()[0]}")
    return references, cases


def ours(arguments, options):
    command = [str(common.BINARY), "bench", "kv", "--json", "--transport", arguments.transport, "--checksum", "both", "--shape", arguments.shape,
               "--tokens", str(arguments.tokens), "--repeat", str(arguments.repeat), *options]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=20 * LIMIT_S)
    if not ended.stdout:
        sys.exit(f"{shlex.join(command)} ended with {ended.returncode}")
    return json.loads(ended.stdout)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def server(command):
    """A reference's own server, ended with the block."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def ask(command, tries=40, is_error=lambda text: False):
    """Runs a reference's client, again until its server listens; its output, or none, with a line that says why."""
    for _ in range(tries):
        try:
            ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return without_result(command, f"nothing in {LIMIT_S} s")
        if ended.returncode == 0 and not is_error(ended.stdout):
            return ended.stdout
        time.sleep(0.1)
    return without_result(command, ended.stdout)


def without_result(command, text):
    """Says in one line that a reference has no figure this time; the run goes on without it."""
    print(f"no result of {shlex.join(command)}: {' '.join(text.split())[-300:]}", file=sys.stderr)


def iperf3(seconds, tries=3):
    if shutil.which("iperf3") is None:
        return None
    # A server that serves one client ends with the first that connects, even one that then fails.
    for _ in range(tries):
        port = str(free_port())
        command = ["iperf3", "-c", "127.0.0.1", "-p", port, "-P", "1", "-t", str(seconds), "-J"]
        with server(["iperf3", "-s", "-1", "-B", "127.0.0.1", "-p", port]):
            # With -J its client ends with 0 even where nobody listens yet.
            text = ask(command, tries=10, is_error=lambda text: '"error":' in text)
        try:
            if text is not None:
                return json.loads(text)["end"]["sum_received"]["bits_per_second"] / 8e9
        except (ValueError, KeyError, TypeError):
            without_result(command, text)
    return None


def put_bandwidth():
    if shutil.which("ucx_perftest") is None:
        return None
    port = str(free_port())
    with server(["ucx_perftest", "-p", port]):
        command = ["ucx_perftest", "127.0.0.1", "-p", port, "-t", "ucp_put_bw", "-s", str(PUT_BYTES), "-n", "100", "-w", "5"]
        text = ask(command)
    if text is None:
        return None
    final = next((line.split() for line in text.splitlines() if line.startswith("Final:")), None)
    if final is None or len(final) < 7:
        return without_result(command, text)
    # It calls 2^20 bytes a megabyte.
    return float(final[6]) * 1.048576 / 1e3


def raw_nixl(command):
    if not command:
        return {}
    text = ask(shlex.split(command), tries=1)
    if text is None:
        return {}
    figures = json.loads(text.strip().splitlines()[-1])
    return {f"nixl {name}": figures[f"{key}_gb_per_s"] for name, key in (("one piece", "one_piece"), ("one by one", "one_by_one"))}


# What is compared with what: our case, the reference, the factor that is wanted.
TARGETS = [
    ("shm/pieces", "memcpy-1", 0.8),
    ("shm/blocks", "memcpy-1", 0.8),
    ("ucx/pieces", "ucp_put_bw", 0.9),
    ("ucx/blocks", "ucp_put_bw", 0.9),
    ("nixl/pieces", "nixl one by one", 5.0),
    ("nixl/pieces", "nixl one piece", 0.8),
    ("tcp/pieces", "iperf3", 0.8),
    ("tcp/blocks", "iperf3", 0.8),
]


def middle(values, of):
    return statistics.median(value[of] for value in values) if values else float("nan")


def share(cases, name, of):
    """What checksums cost of a case: nothing of this is left when they are left out."""
    return 1 - middle(cases.get(name + WITHOUT, []), of) / middle(cases[name], of)


def compare(references, cases):
    """Prints the table; the rows, and whether no target was missed."""
    median = {name: statistics.median(values) for name, values in references.items()}
    print(f"{'case':<12} {'GB/s':>7} {'without':>9} {'checksums, of time':>19} {'of cpu':>7}   wire")
    for name, values in cases.items():
        if name.endswith(WITHOUT):
            continue
        time_share, cpu_share = (share(cases, name, of) for of in ("median_ms", "cpu_ms"))
        without = middle(cases.get(name + WITHOUT, []), "gb_per_s")
        print(f"{name:<12} {middle(values, 'gb_per_s'):>7.2f} {without:>9.2f} {time_share:>19.0%} {cpu_share:>7.0%}   {values[0]['wire']}")
    for name, value in median.items():
        print(f"{name:<20} {value:>7.2f} GB/s alone")
    rows, met = [], True
    for case, reference, wanted in TARGETS:
        if case not in cases or reference not in median:
            rows.append({"case": case, "reference": reference, "wanted": wanted, "ratio": None})
            print(f"{case:<12} not measured against {reference}")
            continue
        ratio = middle(cases[case], "gb_per_s") / median[reference]
        met &= ratio >= wanted
        rows.append({"case": case, "reference": reference, "wanted": wanted, "ratio": round(ratio, 3)})
        print(f"{case:<12} {ratio:>5.2f} × {reference} (target {wanted}): {'met' if ratio >= wanted else 'missed'}")
    return rows, met


if __name__ == "__main__":
    main()
