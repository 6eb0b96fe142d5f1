"""Many hand-offs with clients that leave and a generation server that is killed: nothing leaks, no token is wrong.

Usage: scripts/soak-handoff [--requests 10000] [--kill-every 1000] [--cancel 0.1] [--threads 8] [--transport tcp]
       [--step-tokens 16].
A context server, a generation server and the proxy with a tiny model. Each request is one of the golden prompts; one that
ends must have the golden ids, one that breaks must have been told why. At the end every block must be back on both
sides without any traffic. Resident memory is sampled and plotted beside the raw result. Exit code 1 when anything is off.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import pathlib
import queue
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import common

MODEL = common.ROOT / "tests" / "golden" / "tiny-llama"
GOLDEN = common.ROOT / "tests" / "golden" / "tiny.json"
HELD = ("baton_kv_blocks_used", "baton_kv_blocks_pinned", "baton_kv_blocks_lent", "baton_kv_blocks_quarantined", "baton_kv_leases")
SAMPLE_EVERY = 50
# A server that was just started has not yet touched all that it will use.
WARM_SHARE = 0.2


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Worker:
    """A server on a port of its own that can be killed and started again."""

    def __init__(self, folder, name, options, port):
        self.address, self.folder, self.name = f"127.0.0.1:{port}", pathlib.Path(folder), name
        self.command = ["serve", str(MODEL), "--host", "127.0.0.1", "--port", str(port), "--config", str(options), "--instance", name]
        self.lives, self.process = 0, None

    def start(self):
        self.lives += 1
        # A new name each time, or the address of an earlier life would be taken for this one's.
        told = self.folder / f"{self.name}-{self.lives}.addr"
        log_path = self.folder / f"{self.name}-{self.lives}.log"
        with open(log_path, "wb") as log:
            self.process = subprocess.Popen([common.BINARY, *self.command, "--report-addr", told], stdout=log, stderr=log)
        common.wait_ready(self.process, told, log_path, 120)

    def end(self, number):
        self.process.send_signal(number)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def resident_bytes(self):
        return common.Server(self.address, self.process.pid).resident_bytes()

    def metrics(self):
        """Lines of names and values."""
        connection = http.client.HTTPConnection(self.address, timeout=10)
        connection.request("GET", "/prometheus/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return [line.split(" ") for line in lines]

    def held(self):
        """Every gauge of blocks or leases that is not zero."""
        gauges = [line for line in self.metrics() if line[0] in HELD]
        if len(gauges) != len(HELD):
            sys.exit(f"{self.name} does not show its blocks: {gauges}")
        return {name: float(value) for name, value in gauges if float(value) != 0}

    def counter(self, name):
        return next(int(line[1]) for line in self.metrics() if line[0] == name)


def items():
    found = json.loads(GOLDEN.read_text())["models"]["llama"]
    return [item for item in found if item["min_margin"] > 0.001]


def leave(connection):
    """The client goes away, unless its answer was there first."""
    with contextlib.suppress(OSError):
        if connection.sock:
            connection.sock.shutdown(socket.SHUT_RDWR)


def ask(address, item, cancel_after):
    """One request; what became of it. `cancel_after` is seconds until the client leaves, or None."""
    body = {"model": "m", "prompt": item["prompt_token_ids"], "max_tokens": len(item["output_token_ids"]), "temperature": 0, "detokenize": False, "stream": True}
    ids, outcome = [], "silent end"
    connection = http.client.HTTPConnection(address, timeout=120)
    leaving = None
    try:
        connection.connect()
        if cancel_after is not None:
            leaving = threading.Timer(cancel_after, leave, (connection,))
            leaving.start()
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            return "told"
        for line in response:
            if line.startswith(b"data: [DONE]"):
                outcome = "right" if ids == item["output_token_ids"] else f"wrong: {ids} for {item['output_token_ids']}"
            elif line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "choices" not in event:
                    return "told"
                for choice in event["choices"]:
                    ids += choice.get("token_ids") or []
    except (OSError, http.client.HTTPException) as error:
        outcome = f"broken: {error!r}"
    finally:
        if leaving:
            leaving.cancel()
        with contextlib.suppress(OSError):
            connection.close()
    return "left" if cancel_after is not None and outcome != "right" and not outcome.startswith("wrong") else outcome


def load(address, jobs, outcomes):
    while (job := jobs.get()) is not None:
        outcomes.append((job[0], ask(address, *job[1:])))


def run(arguments, folder):
    options, config = pathlib.Path(folder) / "options.yaml", pathlib.Path(folder) / "disagg_config.yaml"
    transceiver = {"backend": arguments.transport.upper(), "kv_transfer_timeout_ms": 10000}
    # A small pool is soon touched all over; what a prompt's prefix is not found in has to travel.
    kv = {"max_tokens": 4096, "enable_block_reuse": False}
    engine = {"dtype": "float32", "max_seq_len": 512, "kv_cache_config": kv, "cache_transceiver_config": transceiver}
    if arguments.step_tokens:
        engine |= {"max_num_tokens": arguments.step_tokens, "enable_chunked_prefill": True}
        kv["tokens_per_block"] = 8
    options.write_text(json.dumps(engine))
    context = Worker(folder, "context", options, free_port())
    generation = Worker(folder, "generation", options, free_port())
    config.write_text(json.dumps({
        "hostname": "127.0.0.1", "port": 0,
        "context_servers": {"num_instances": 1, "urls": [context.address]},
        "generation_servers": {"num_instances": 1, "urls": [generation.address]},
    }))
    context.start()
    generation.start()
    try:
        with common.process(["disaggregated", "-c", str(config)]) as proxy:
            return drive(arguments, context, generation, proxy.address)
    finally:
        for worker in (context, generation):
            worker.end(signal.SIGTERM)


def drive(arguments, context, generation, address):
    rng, golden = random.Random(7), items()
    jobs, outcomes, samples = queue.Queue(maxsize=2 * arguments.threads), [], []
    threads = [threading.Thread(target=load, args=(address, jobs, outcomes)) for _ in range(arguments.threads)]
    for thread in threads:
        thread.start()
    for index in range(arguments.requests):
        leaves = rng.uniform(0, 0.15) if rng.random() < arguments.cancel else None
        jobs.put((index, rng.choice(golden), leaves))
        if index % SAMPLE_EVERY == 0:
            samples.append({"request": index, "context": context.resident_bytes(), "generation": generation.resident_bytes(), "life": generation.lives})
        if arguments.kill_every and index and index % arguments.kill_every == 0:
            generation.end(signal.SIGKILL)
            generation.start()
            wait_ready(address)
    for _ in threads:
        jobs.put(None)
    for thread in threads:
        thread.join()
    early = context.counter("baton_handoffs_opened_early_total"), generation.counter("baton_handoffs_prefetched_total")
    return {"outcomes": count(outcomes), "samples": samples, "held": settled(context, generation), "lives": generation.lives,
            "opened_early": early[0], "prefetched_in_last_life": early[1]}


def wait_ready(address):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection(address, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.05)
    sys.exit("the deployment is not ready 60 s after its generation server was started again")


def settled(*workers):
    """What is still held when every lease has had its time, with no traffic at all."""
    deadline = time.monotonic() + 30
    while True:
        held = {worker.name: worker.held() for worker in workers}
        if not any(held.values()) or time.monotonic() > deadline:
            return held
        time.sleep(0.2)


def count(outcomes):
    kinds = sorted(outcome.split(":")[0] for _, outcome in outcomes)
    counted = {kind: len(list(group)) for kind, group in itertools.groupby(kinds)}
    odd = [outcome for outcome in outcomes if outcome[1].split(":")[0] not in ("right", "left", "told")]
    return {"counted": counted, "odd": odd[:20]}


def growth(samples, name):
    """Mean resident memory of the last fifth over that of the second fifth, of a server's longest life."""
    longest = max({s["life"] for s in samples}, key=lambda life: sum(s["life"] == life for s in samples))
    values = [s[name] for s in samples if name == "context" or s["life"] == longest]
    values = values[int(len(values) * WARM_SHARE):]
    part = max(1, len(values) // 5)
    return (sum(values[-part:]) / part) / (sum(values[:part]) / part)


def plot(samples, path):
    """Resident memory over requests, as SVG."""
    width, height, margin = 900, 320, 50
    last, most = max(s["request"] for s in samples) or 1, max(max(s["context"], s["generation"]) for s in samples)

    def line(name, colour):
        points = " ".join(f"{margin + s['request'] / last * (width - 2 * margin):.1f},{height - margin - s[name] / most * (height - 2 * margin):.1f}" for s in samples)
        return f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{points}"/>'

    text = '<text x="{}" y="{}" font-family="sans-serif" font-size="12" fill="{}">{}</text>'.format
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"><rect width="100%" height="100%" fill="white"/>'
        + line("context", "#1f77b4") + line("generation", "#d62728")
        + text(margin, 20, "#1f77b4", "context server, resident MB") + text(margin + 220, 20, "#d62728", "generation server, resident MB (killed and started again)")
        + text(5, margin + 5, "black", f"{most / 1e6:.0f}") + text(25, height - margin, "black", "0")
        + text(width - margin - 40, height - margin + 20, "black", f"{last} requests") + "</svg>\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--kill-every", type=int, default=1000)
    parser.add_argument("--cancel", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--transport", default="DEFAULT")
    parser.add_argument("--step-tokens", type=int, default=16, help="of a step, so that KV travels while prompts are read; 0: whole prompts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-soak-") as folder:
        result = run(arguments, folder)
    result["growth"] = {name: growth(result["samples"], name) for name in ("context", "generation")}
    print(f"outcomes: {result['outcomes']['counted']}; generation server started {result['lives']} times")
    print(f"opened while the prompt was read: {result['opened_early']}; taken over in the last life: {result['prefetched_in_last_life']}")
    print(f"still held at the end: {result['held']}")
    print(f"resident memory, late over early: context {result['growth']['context']:.3f}, generation {result['growth']['generation']:.3f} (longest life)")
    name = f"soak-{arguments.transport.lower()}"
    common.keep(name, {"arguments": vars(arguments), **result})
    plot(result["samples"], common.ROOT / "scripts" / "runs" / f"{time.strftime('%Y-%m-%d')}-{name}.svg")
    for odd in result["outcomes"]["odd"]:
        print(f"request {odd[0]}: {odd[1]}")
    flat = all(value < 1.1 for value in result["growth"].values())
    sys.exit(0 if flat and not result["outcomes"]["odd"] and not any(result["held"].values()) else 1)


if __name__ == "__main__":
    main()
