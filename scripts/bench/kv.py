"""KV hand-off between two processes of this machine, each transport right beside what its parts do alone.

Usage: scripts/bench-kv [--tokens N] [--repeat N] [--rounds N] [--rounds-without N] [--transport LIST] [--nixl-raw COMMAND]

Ours: `baton bench kv` of a Llama-3.1-8B request (8,192 tokens are 1 GiB), in scattered 64 KiB pieces and in whole blocks of
32 tokens, every byte compared, with checksums; in some rounds also without, right after, which gives what they cost (not for
the targets). Beside it: copies between two buffers (each `baton bench kv` begins with them), UCX's own ucp_put_bw at 64 MiB
over the same UCX_TLS (ucx), iperf3 with one stream (tcp), and NIXL alone (nixl): scripts/bench/nixl_raw.py where
BATON_NIXL_LIBRARY names NIXL, or the command of --nixl-raw, whose last line is JSON with one_piece_gb_per_s and
one_by_one_gb_per_s.

The memory of a shared machine changes its speed by a factor of two within seconds, so a round goes through the transports: the
references of one, its two cases (pieces first in every other round), and then the next transport. A case is compared with the
references of its own transport and round (with the copies of its own run), and the median of these ratios over the rounds with
the target; the smallest and the largest are told too. GB are 10⁹ bytes, and GB/s medians over the rounds. On two cores a round
of 8,192 tokens takes 80 to 110 s with all four transports, and 15 to 20 s more without checksums too: 10 to 12 minutes in all.
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

CUTS = [("pieces", ["--piece-bytes", str(64 << 10)]), ("blocks", ["--tokens-per-block", "32"])]
WITHOUT = " without checksums"
PUT_BYTES = 64 << 20
LIMIT_S = 120


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--repeat", type=int, default=3, help="timed transfers a case and round")
    parser.add_argument("--rounds", type=int, default=7, help="times that everything is run")
    parser.add_argument("--rounds-without", type=int, default=2, help="of them, how many also leave checksums out: the first")
    parser.add_argument("--transport", default="all")
    parser.add_argument("--seconds", type=int, default=2, help="of iperf3, a round")
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
    """What each reference gave, in order, and for each of our cases a figure a round with the references beside it."""
    references, cases = {}, {}

    def refer(found):
        for name, gb_per_s in found.items():
            references.setdefault(name, []).append(gb_per_s)
        return found

    transports = those_there(arguments)
    for turn in range(arguments.rounds):
        checksum = "both" if turn < arguments.rounds_without else "on"
        for transport in transports:
            alone = refer(parts_of(transport, arguments))
            # Neither cut is always the one that is nearer to the references.
            for cut, options in CUTS if turn % 2 == 0 else reversed(CUTS):
                report = ours(transport, ["--shape", arguments.shape, "--tokens", str(arguments.tokens), "--repeat", str(arguments.repeat),
                                          "--checksum", checksum, *options])
                copies = refer({f"{found['name']}-{found['threads']}": found["gb_per_s"] for found in report["references"]})
                for case in report["results"]:
                    name = f"{transport}/{cut}" + ("" if case["checksums"] else WITHOUT)
                    figure = {"round": turn, "wire": case["wire"], **case["figures"], "beside": {**alone, **copies}}
                    cases.setdefault(name, []).append(figure)
    return references, cases


def those_there(arguments):
    """The transports that can be measured, by a glance at all that were asked for; the others are told."""
    report = ours(arguments.transport, ["--shape", arguments.shape, "--tokens", "32", "--repeat", "1", "--warmup", "0"])
    for skipped in report["skipped"]:
        print(f"{skipped['transport']} is not there: {skipped['reason'].splitlines()[0]}")
    return list(dict.fromkeys(case["transport"] for case in report["results"]))


def parts_of(transport, arguments):
    """What a transport's parts do alone, measured now: GB/s by name, without those that have no figure."""
    found = {}
    if transport == "tcp":
        found = {"iperf3": iperf3(arguments.seconds)}
    elif transport == "ucx":
        found = {"ucp_put_bw": put_bandwidth()}
    elif transport == "nixl":
        found = raw_nixl(arguments.nixl_raw)
    return {name: gb_per_s for name, gb_per_s in found.items() if gb_per_s is not None}


def ours(transports, options):
    """A report of `baton bench kv`, in which each case has passed."""
    command = [str(common.BINARY), "bench", "kv", "--json", "--transport", transports, *options]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=20 * LIMIT_S)
    if not ended.stdout:
        sys.exit(f"{shlex.join(command)} ended with {ended.returncode}")
    report = json.loads(ended.stdout)
    for case in report["results"]:
        if case["status"] != "PASS":
            sys.exit(f"{case['transport']} in pieces of {case['piece_bytes']} bytes: {case['status']}: {case['detail']}")
    return report


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
    """What checksums cost of a case, the median of the rounds that have both: nothing of this is left when they are left out."""
    without = {figure["round"]: figure[of] for figure in cases.get(name + WITHOUT, [])}
    shares = [1 - without[figure["round"]] / figure[of] for figure in cases[name] if figure["round"] in without]
    return statistics.median(shares) if shares else float("nan")


def compare(references, cases):
    """Prints the table; the rows, and whether no target was missed."""
    print(f"{'case':<12} {'GB/s':>7} {'without':>9} {'checksums, of time':>19} {'of cpu':>7}   wire")
    for name, values in cases.items():
        if name.endswith(WITHOUT):
            continue
        time_share, cpu_share = (share(cases, name, of) for of in ("median_ms", "cpu_ms"))
        without = middle(cases.get(name + WITHOUT, []), "gb_per_s")
        print(f"{name:<12} {middle(values, 'gb_per_s'):>7.2f} {without:>9.2f} {time_share:>19.0%} {cpu_share:>7.0%}   {values[0]['wire']}")
    for name, values in references.items():
        print(f"{name:<20} {statistics.median(values):>7.2f} GB/s alone")
    rows, met = [], True
    for case, reference, wanted in TARGETS:
        row = {"case": case, "reference": reference, "wanted": wanted, "ratio": None}
        rows.append(row)
        figures = [figure for figure in cases.get(case, []) if reference in figure["beside"]]
        if not figures:
            print(f"{case:<12} not measured against {reference}")
            continue
        ratios = common.summary([figure["gb_per_s"] / figure["beside"][reference] for figure in figures])
        ratio, smallest, largest = ratios["median"], ratios["min"], ratios["max"]
        met &= ratio >= wanted
        row |= {"ratio": round(ratio, 3), "ratio_min": round(smallest, 3), "ratio_max": round(largest, 3), "rounds": ratios["n"]}
        verdict = "met" if ratio >= wanted else "missed"
        print(f"{case:<12} {ratio:>5.2f} × {reference}, {smallest:.2f} to {largest:.2f} by round (target {wanted}): {verdict}")
    return rows, met


if __name__ == "__main__":
    main()
