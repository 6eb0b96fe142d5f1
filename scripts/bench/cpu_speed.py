"""Prefill and decode of one server beside llama.cpp, same file, same threads, in alternating rounds.

Usage: scripts/bench-cpu [--rounds N] (which installs what this needs). Baton is measured from outside, through HTTP and a
stream; llama.cpp from inside, through its C API, which favours it. Prefix reuse is off on both sides.
"""

import argparse
import concurrent.futures
import json
import pathlib
import random
import tempfile
import time

import common

PREFILL = 512
DECODE = 128
VOCABULARY = range(1000, 40000)


def prompt(rng, length):
    return [rng.choice(VOCABULARY) for _ in range(length)]


class Llama:
    def __init__(self, model, threads):
        import llama_cpp

        self.engine = llama_cpp.Llama(model, n_threads=threads, n_threads_batch=threads, n_ctx=2048, n_batch=PREFILL, verbose=False)

    def prefill(self, tokens):
        self.engine.reset()
        started = time.perf_counter()
        self.engine.eval(tokens)
        return len(tokens) / (time.perf_counter() - started)

    def decode(self, tokens):
        self.engine.reset()
        self.engine.eval(tokens)
        token = 1000
        started = time.perf_counter()
        for _ in range(DECODE):
            self.engine.eval([token])
            token = 1000 + token % 997
        return DECODE / (time.perf_counter() - started)


class Baton:
    def __init__(self, address):
        self.address = address

    def body(self, tokens, count):
        return {"model": "m", "prompt": tokens, "max_tokens": count, "temperature": 0, "ignore_eos": True, "detokenize": False}

    def prefill(self, tokens):
        return len(tokens) / common.stream(self.address, self.body(tokens, 1))[0]

    def decode(self, tokens):
        times = common.stream(self.address, self.body(tokens, DECODE))
        return (len(times) - 1) / (times[-1] - times[0])

    def decode_many(self, prompts):
        """Tokens per second of all streams together, between the last first token and the first last one."""
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            base = time.perf_counter()

            def one(tokens):
                offset = time.perf_counter() - base
                return [offset + at for at in common.stream(self.address, self.body(tokens, DECODE))]

            streams = list(pool.map(one, prompts))
        start, end = max(s[0] for s in streams), min(s[-1] for s in streams)
        return sum(1 for s in streams for at in s if start < at <= end) / (end - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    model = common.model_path()
    rng = random.Random(7)
    options = {"num_threads": arguments.threads, "max_batch_size": 16, "max_seq_len": 2048,
               "kv_cache_config": {"enable_block_reuse": False, "max_tokens": 32768}}
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder) / "options.yaml"
        config.write_text(json.dumps(options))  # JSON is YAML.
        with common.process(["serve", model, "--host", "127.0.0.1", "--port", "0", "--config", str(config)]) as server:
            measure(Llama(model, arguments.threads), Baton(server.address), arguments.rounds, rng)


def measure(llama, baton, rounds, rng):
    series = {name: [] for name in ("llama_prefill", "baton_prefill", "llama_decode", "baton_decode", "baton_decode_8")}
    for side in (llama, baton):
        side.prefill(prompt(rng, PREFILL))
    for _ in range(rounds):
        long, short = prompt(rng, PREFILL), prompt(rng, 16)
        series["llama_prefill"].append(llama.prefill(long))
        series["baton_prefill"].append(baton.prefill(long))
        series["llama_decode"].append(llama.decode(short))
        series["baton_decode"].append(baton.decode(short))
        series["baton_decode_8"].append(baton.decode_many([prompt(rng, 16) for _ in range(8)]))
    figures = {name: common.summary(values) for name, values in series.items()}
    median = {name: value["median"] for name, value in figures.items()}
    ratios = {
        "prefill, baton / llama.cpp (target 1.0)": median["baton_prefill"] / median["llama_prefill"],
        "decode, baton / llama.cpp (target 0.7)": median["baton_decode"] / median["llama_decode"],
        "decode, 8 requests / 1 (target 2.5)": median["baton_decode_8"] / median["baton_decode"],
    }
    for name, value in median.items():
        print(f"{name:<16} {value:8.1f} tokens/s")
    for name, value in ratios.items():
        print(f"{name:<42} {value:.2f}")
    common.keep("cpu-speed", {"raw": series, "figures": figures, "ratios": ratios})


if __name__ == "__main__":
    main()
