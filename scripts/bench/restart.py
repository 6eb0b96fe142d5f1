"""A rank of a generation instance is killed under load: how long until it serves again, and which requests are lost?

Usage: scripts/bench-restart [--rate 20] [--seconds 20]. One srun world on the local cluster: one context server, two
generation servers of two ranks each (tiny model), the proxy. Requests stream; a lost one must end with an error event.
"""

import argparse
import collections
import http.client
import json
import os
import pathlib
import re
import signal
import subprocess
import tempfile
import threading
import time

import common

MODEL = common.ROOT / "tests" / "golden" / "tiny-llama"


def ask(address, index, outcomes):
    body = {"model": "m", "prompt": [3 + (index * 7 + k) % 200 for k in range(24)], "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}
    sent, tokens, outcome = time.monotonic(), 0, "silent end"
    try:
        connection = http.client.HTTPConnection(address, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            outcome = f"status {response.status}"
        for line in response:
            if line.startswith(b"data: [DONE]") and outcome == "silent end":
                outcome = "complete"
            elif line.startswith(b"data: {") and b'"error"' in line:
                outcome = "error event"
            elif line.startswith(b"data: {"):
                tokens += 1
    except OSError as error:
        outcome = f"connection: {error}"
    outcomes.append({"index": index, "sent": sent, "ended": time.monotonic(), "chunks": tokens, "outcome": outcome})


def load(address, rate, seconds, outcomes):
    threads, begun = [], time.monotonic()
    for index in range(int(rate * seconds)):
        time.sleep(max(0.0, begun + index / rate - time.monotonic()))
        threads.append(threading.Thread(target=ask, args=(address, index, outcomes)))
        threads[-1].start()
    for thread in threads:
        thread.join(120)


def follower_of(label):
    """The pid of a follower rank: the `baton rank` whose launcher was told to follow this instance."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            variables = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[1:2] == [b"rank"] and f"BATON_BENCH_ROLE={label}".encode() in variables:
            return int(pid)
    raise SystemExit("no follower runs")


def wait_for(path, child, log, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        if child.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"not ready:\n{log.read_text()[-3000:]}")
        time.sleep(0.05)
    return path.read_text().strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=20)
    parser.add_argument("--seconds", type=float, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        folder = pathlib.Path(folder)
        config, ready, log = folder / "disagg_config.yaml", folder / "ready", folder / "log"
        role = {"num_instances": 2, "tensor_parallel_size": 2}
        config.write_text(json.dumps({"hostname": "0.0.0.0", "port": 0, "model": str(MODEL), "dtype": "float32", "kv_cache_config": {"max_tokens": 32768}, "context_servers": {"num_instances": 1}, "generation_servers": role}))
        line = ["srun", "--overcommit", "-N3", "-n5", "--mpi=pmix", str(common.BINARY), "launch", "-c", str(config), "--ready-file", str(ready)]
        with open(log, "wb") as out:
            child = subprocess.Popen(line, stdout=out, stderr=out, env={**os.environ, "BATON_BENCH_ROLE": "world"})
        try:
            run(arguments, wait_for(ready, child, log), log)
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait(60)


def run(arguments, address, log):
    outcomes = []
    thread = threading.Thread(target=load, args=(address, arguments.rate, arguments.seconds, outcomes))
    thread.start()
    time.sleep(arguments.seconds / 4)
    killed = time.monotonic()
    os.kill(follower_of("world"), signal.SIGKILL)
    thread.join(300)
    again = re.findall(r'serves again instance="(\w+)" epoch=\d+ elapsed_ms=(\d+)', log.read_text())
    tally = collections.Counter(entry["outcome"] for entry in outcomes)
    lost = [entry for entry in outcomes if entry["outcome"] != "complete"]
    streaming = [entry for entry in lost if entry["sent"] < killed < entry["ended"] + 5]
    print(f"{len(outcomes)} requests at {arguments.rate:g}/s, one follower rank killed: {dict(tally)}")
    print(f"served again after: {', '.join(f'{label} {ms} ms' for label, ms in again) or 'not seen'}")
    print(f"lost: {len(lost)}, of them in flight at the kill: {len(streaming)}, without an error event: {tally['silent end']}")
    common.keep("restart", {"rate": arguments.rate, "seconds": arguments.seconds, "served_again_ms": again, "outcomes": tally, "lost": lost})
    if not again or tally["silent end"]:
        raise SystemExit("not as it should be")


if __name__ == "__main__":
    main()
