#!/usr/bin/env python3
"""What several ranks and a deployment do on two GPUs, in one go: the golden answers on TP2 and PP2 and through hand-offs between
devices, a rank that dies, decoding on one GPU and two, and one deployment beside an aggregated server. Every step has a time limit,
and what fails does not stop the rest.

Usage: two.py FOLDER --golden DIR [--steps golden,handoff,loss,decode,deploy] [--device cuda|cpu] [--small]
`baton` lies beside this file (scripts/gpu/pack). DIR holds tiny.json and the tiny models. --small and --device cpu rehearse the whole on
a machine without a GPU.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
BATON = HERE / "baton"
# Where two tokens are closer than this, bf16 may choose the other; from there on nothing is compared.
MARGIN = 0.15
# What bf16 may change in a token's log-probability on the way through a tiny model.
LOGPROB = 0.12
PORTS = iter(range(21000, 22000))
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000}


class Process:
    """A child with its own group and log, ended with the block."""

    def __init__(self, log, words, env=None):
        self.log, self.words = log, [str(word) for word in words]
        self.env = {**os.environ, **(env or {})}

    def __enter__(self):
        with open(self.log, "wb") as log:
            self.child = subprocess.Popen(self.words, stdout=log, stderr=subprocess.STDOUT, env=self.env, start_new_session=True)
        return self

    def __exit__(self, *_):
        for what, patience in ((signal.SIGTERM, 8), (signal.SIGKILL, 5)):
            if self.child.poll() is None:
                try:
                    os.killpg(self.child.pid, what)
                    self.child.wait(patience)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    pass

    def tail(self, size=700):
        return pathlib.Path(self.log).read_text(errors="replace")[-size:]


def ask(port, path, body=None, timeout=60):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.loads(answer.read() or b"null")


def ready(process, port, limit):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if process.child.poll() is not None:
            raise RuntimeError(f"ended with {process.child.returncode}: {process.tail()}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"not ready in {limit} s: {process.tail()}")


class Bench:
    def __init__(self, arguments):
        self.folder = pathlib.Path(arguments.folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.golden, self.device, self.small = pathlib.Path(arguments.golden).resolve(), arguments.device, arguments.small
        self.results = {}
        self.model = self.folder / "llama-3.1-8b"
        self.model.mkdir(exist_ok=True)
        (self.model / "config.json").write_text(json.dumps({**LLAMA, **(SMALL if self.small else {})}))
        # Every token has a text, so that every token is an event.
        tokenizer = json.loads((self.golden / "tiny-llama" / "tokenizer.json").read_text())
        vocab = tokenizer["model"]["vocab"]
        vocab.update({f"t{id}": id for id in range(max(vocab.values()) + 1, json.loads((self.model / "config.json").read_text())["vocab_size"])})
        (self.model / "tokenizer.json").write_text(json.dumps(tokenizer))
        (self.model / "tokenizer_config.json").write_bytes((self.golden / "tiny-llama" / "tokenizer_config.json").read_bytes())
        self.quiet = self.folder / "no-reuse.yaml"
        self.quiet.write_text("kv_cache_config:\n  enable_block_reuse: false\n")

    def log(self, name):
        return self.folder / f"{name}.log"

    def step(self, name, act):
        begun = time.monotonic()
        try:
            found = act()
        except Exception as error:  # The rest goes on.
            found = {"failed": f"{type(error).__name__}: {error}"[-1500:]}
        found["seconds"] = round(time.monotonic() - begun, 1)
        self.results[name] = found
        (self.folder / "two.json").write_text(json.dumps(self.results, indent=1) + "\n")
        print(name, json.dumps(found), flush=True)

    # === answers ===

    def tiny(self, name, model, device, grid=(1, 1), gpu=None, more="", extra=()):
        """A server of a tiny model on TP x PP ranks; on one GPU, or on both."""
        port = next(PORTS)
        config = self.folder / f"{name}.yaml"
        dtype = "kv_cache_config: {max_tokens: 4096, enable_block_reuse: false, dtype: float16}\n"
        config.write_text(f"max_seq_len: 512\nmax_batch_size: 4\ntensor_parallel_size: {grid[0]}\npipeline_parallel_size: {grid[1]}\n{dtype}{more}")
        env = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
        words = [BATON, "serve", self.golden / f"tiny-{model}", "--host", "127.0.0.1", "--port", port, "--device", device, "--config", config, *extra]
        return port, Process(self.log(name), words, env)

    def answers(self, port, model):
        """How much of the golden answers came, and how far the log-probabilities are off. A wrong token is an error."""
        compared, off, rows = 0, 0.0, []
        for item in json.loads((self.golden / "tiny.json").read_text())["models"][model]:
            count = len(item["output_token_ids"])
            answer = ask(port, "/v1/completions", {
                "model": "m", "prompt": item["prompt_token_ids"], "max_tokens": count, "temperature": 0, "ignore_eos": True, "detokenize": False, "logprobs": 1})
            choice = answer["choices"][0]
            ids = choice["token_ids"]
            probabilities = (choice.get("logprobs") or {}).get("token_logprobs") or []
            rows.append([ids, probabilities])
            # Of the later tokens only the smallest margin is known.
            sure = len(item["top5"]) if item["min_margin"] < MARGIN else count
            for at, expected in enumerate(item["output_token_ids"][:sure]):
                best = item["top5"][at] if at < len(item["top5"]) else None
                if best and best[0][1] - best[1][1] < MARGIN:
                    break
                if at >= len(ids) or ids[at] != expected:
                    raise RuntimeError(f"token {at} of {item['prompt']!r}: {ids[:at + 1]} instead of {item['output_token_ids'][:at + 1]}")
                compared += 1
                if at < len(probabilities):
                    off = max(off, abs(probabilities[at] - item["logprobs"][at]))
        if off > LOGPROB:
            raise RuntimeError(f"log-probabilities are off by {off:.3f}")
        return {"tokens_compared": compared, "logprob_off": round(off, 4)}, rows

    def grids(self):
        """The same answers on one GPU, two tensor ranks and two stages."""
        cases = [(model, grid, way) for model in ("llama", "qwen3") for grid, way in (((1, 1), None), ((2, 1), None), ((2, 1), "nccl"), ((1, 2), None))]

        def run(case):
            model, grid, way = case
            name = f"golden-{model}-tp{grid[0]}-pp{grid[1]}" + (f"-{way}" if way else "")
            port, process = self.tiny(name, model, self.device, grid, 0 if grid == (1, 1) and self.device == "cuda" else None)
            if way:
                process.env["BATON_DEVICE_SUMS"] = way
            try:
                with process:
                    ready(process, port, 60)
                    found, rows = self.answers(port, model)
                    found["backend"] = ask(port, "/server_info").get("backend")
                    # Several sequences at once decode in recorded steps of other sizes, with drawn tokens too.
                    with concurrent.futures.ThreadPoolExecutor(4) as pool:
                        asked = [{"model": "m", "prompt": [5 + n, 9, 30], "max_tokens": 40, "temperature": 0.8, "seed": 7 + n, "detokenize": False} for n in range(4)]
                        drawn = list(pool.map(lambda body: ask(port, "/v1/completions", body)["choices"][0]["token_ids"], asked))
                    found["drawn"] = [len(ids) for ids in drawn]
                    return name, found
            except Exception as error:
                return name, {"failed": f"{error}"[-900:]}

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = dict(pool.map(run, cases))
        for name, one in found.items():
            self.results[name] = one
        bad = [name for name, one in found.items() if "failed" in one]
        return {"ok": len(found) - len(bad), **({"failed": {name: found[name]["failed"] for name in bad}} if bad else {})}

    def handoffs(self):
        """The golden answers through hand-offs: between devices, and between GPUs whose ranks divide the model alike and not."""
        gpu = self.device
        cases = [
            ("cpu-to-gpu", ("cpu", (1, 1), None), (gpu, (1, 1), 0)), ("gpu-to-cpu", (gpu, (1, 1), 0), ("cpu", (1, 1), None)),
            ("tp2-to-tp2", (gpu, (2, 1), None), (gpu, (2, 1), None)), ("tp2-to-tp1", (gpu, (2, 1), None), (gpu, (1, 1), 1)),
            ("tp1-to-pp2", (gpu, (1, 1), 0), (gpu, (1, 2), None)),
        ]

        def run(case):
            name, context, generation = case
            transfer = "cache_transceiver_config: {backend: DEFAULT}\n"
            try:
                ports, processes = zip(*[self.tiny(f"handoff-{name}-{side}", "llama", *place, more=transfer)
                                         for side, place in (("context", context), ("generation", generation))])
                port = next(PORTS)
                front = self.folder / f"handoff-{name}.yaml"
                front.write_text(f"hostname: 127.0.0.1\nport: {port}\ncontext_servers: {{num_instances: 1, urls: ['127.0.0.1:{ports[0]}']}}\n"
                                 f"generation_servers: {{num_instances: 1, urls: ['127.0.0.1:{ports[1]}']}}\n")
                with processes[0] as first, processes[1] as second:
                    ready(first, ports[0], 60)
                    ready(second, ports[1], 60)
                    with Process(self.log(f"handoff-{name}-proxy"), [BATON, "disaggregated", "-c", front]) as proxy:
                        ready(proxy, port, 30)
                        found, _ = self.answers(port, "llama")
                        pairs = (ask(ports[1], "/server_info").get("transport") or {}).get("rank_pairs") or []
                        found["pairs"] = [[pair["peer_rank"], pair["rank"], pair["transport"], pair["bytes_received"]] for pair in pairs]
                        if not pairs or not all(pair["bytes_received"] for pair in pairs):
                            raise RuntimeError(f"no KV came: {pairs} {second.tail()}")
                        return name, found
            except Exception as error:
                return name, {"failed": f"{error}"[-900:]}

        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            return dict(pool.map(run, cases))

    def loss(self):
        """A rank that follows is killed while its leader decodes: the leader says so soon, and does not hang."""
        port, process = self.tiny("loss", "llama", self.device, (2, 1))
        with process:
            ready(process, port, 60)
            everybody = subprocess.run(["ps", "-eo", "pid=,args="], stdout=subprocess.PIPE, text=True, check=False).stdout
            ranks = [int(line.split()[0]) for line in everybody.splitlines() if line.rstrip().endswith("/baton rank")]
            if not ranks:
                raise RuntimeError("no follower found")

            def ask_long(number):
                begun = time.monotonic()
                try:
                    answer = ask(port, "/v1/completions", {"model": "m", "prompt": [3 + number, 5, 7], "max_tokens": 450, "temperature": 0, "ignore_eos": True, "detokenize": False}, 40)
                    return round(time.monotonic() - begun, 2), f"{len(answer['choices'][0]['token_ids'])} tokens"
                except Exception as error:
                    return round(time.monotonic() - begun, 2), f"{type(error).__name__}: {error}"[:200]

            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                asked = [pool.submit(ask_long, number) for number in range(4)]
                time.sleep(0.15)
                for rank in ranks[:1]:
                    os.kill(rank, signal.SIGKILL)
                killed = time.monotonic()
                outcomes = [one.result() for one in asked]
            told = round(time.monotonic() - killed, 2)
            log = pathlib.Path(process.log).read_text(errors="replace")
            said = [line[-300:] for line in log.splitlines() if "lost" in line or "given up" in line][:6]
            return {"outcomes": outcomes, "seconds_until_all_told": told, "said": said}

    def refusal(self):
        """More ranks than GPUs: known before anything starts, or, where the device is not asked for by name, when the ranks meet."""
        found = {}
        for device in (self.device, "auto"):
            port, process = self.tiny(f"refusal-{device}", "llama", device, (4, 1))
            with process:
                begun = time.monotonic()
                try:
                    process.child.wait(60)
                except subprocess.TimeoutExpired:
                    raise RuntimeError(f"still there: {process.tail()}") from None
                text = pathlib.Path(process.log).read_text(errors="replace")
                said = [line[-250:] for line in text.splitlines() if "same gpu" in line or "wants a gpu" in line]
                found[device] = {"exit": process.child.returncode, "after_s": round(time.monotonic() - begun, 1), "said": said[:2] or text[-600:]}
        return found

    # === speed ===

    def offline(self, name, words, env=None, limit=100):
        report = self.folder / f"{name}.json"
        command = [BATON, "bench", "serve", "--offline", self.model, "--load-format", "dummy", "--device", self.device, "--max-seq-len", 16384,
                   "--max-batch-size", 64, "--enable-chunked-prefill", "--config", self.quiet, "--json", report, "--accept", "short,warmup,length,saturated", *words]
        with Process(self.log(name), command, env) as process:
            run = self.first_run(process, report, limit)
        return {"itl_p50_ms": run["itl_ms"]["p50"], "itl_p99_ms": run["itl_ms"]["p99"], "ttft_p50_ms": run["ttft_ms"]["p50"], "output_tokens_per_s": run["output_tokens_per_s"]}

    def decode(self):
        """Decoding on one GPU and on two; sums in peer memory and by NCCL."""
        length = ["--isl", 128, "--osl", 64 if self.small else 384]
        one = ["--num-prompts", 2, "--concurrency", 1, "--warmup", 1, *length]
        many = ["--num-prompts", 32, "--concurrency", 16, "--warmup", 16, *length]
        prompt = ["--num-prompts", 3, "--concurrency", 1, "--warmup", 1, "--isl", 256 if self.small else 8192, "--osl", 2]
        rows = [("tp1", [], {}), ("tp2", ["--tp_size", 2], {}), ("tp2-nccl", ["--tp_size", 2], {"BATON_DEVICE_SUMS": "nccl"}),
                ("tp2-nccl-unmixed", ["--tp_size", 2], {"BATON_DEVICE_SUMS": "nccl", "NCCL_GRAPH_MIXING_SUPPORT": "0"})]
        found = {}
        for name, words, env in rows:
            for load, loaded in (("1", one), ("16", many), ("prompt", prompt))[: 1 if "nccl" in name else 3]:
                try:
                    found[f"{name} x{load}"] = self.offline(f"decode-{name}-{load}", [*words, *loaded], env)
                except Exception as error:
                    found[f"{name} x{load}"] = {"failed": str(error)[-900:]}
        for load, what in (("1", "itl_p50_ms"), ("16", "itl_p50_ms"), ("prompt", "ttft_p50_ms")):
            one, two = (found[f"{name} x{load}"].get(what) for name in ("tp1", "tp2"))
            if one and two:
                found[f"tp2/tp1 x{load}"] = round(one / two, 3)
        return found

    def server(self, name, gpu, config):
        port = next(PORTS)
        words = [BATON, "serve", self.model, "--load_format", "dummy", "--device", self.device, "--max_seq_len", 16384, "--max_batch_size", 64,
                 "--enable_chunked_prefill", "--host", "127.0.0.1", "--port", port, "--config", config]
        return port, Process(self.log(name), words, {"CUDA_VISIBLE_DEVICES": str(gpu)} if self.device == "cuda" else {})

    def load(self, name, port, words, limit=90):
        """Measures a server or a proxy; gives the process, to be waited for."""
        report = self.folder / f"{name}.json"
        command = [BATON, "bench", "serve", "--url", f"http://127.0.0.1:{port}", "--model", "m", "--vocab-size", 1000 if self.small else 128256, "--json", report,
                   "--accept", "short,warmup,length,saturated", *self.length, *words]
        return Process(self.log(name), command), report, limit

    @staticmethod
    def first_run(process, report, limit):
        """What a bench reports, when it has ended."""
        try:
            process.child.wait(limit)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"longer than {limit} s: {process.tail()}") from None
        if process.child.returncode:
            raise RuntimeError(f"ended with {process.child.returncode}: {process.tail()}")
        return json.loads(report.read_text())["runs"][0]

    def measured(self, process, report, limit):
        run = self.first_run(process, report, limit)
        return {"itl_ms": run["itl_ms"], "ttft_ms": run["ttft_ms"], "output_tokens_per_s": run["output_tokens_per_s"]}

    def once(self, *load):
        process, report, limit = self.load(*load)
        with process:
            return self.measured(process, report, limit)

    def deploy(self, rates, seconds):
        """An aggregated server on each GPU, beside a context server on one and a generation server on the other."""
        self.length = ["--isl", 256, "--osl", 32] if self.small else ["--isl", 8192, "--osl", 256]
        alone = ["--num-prompts", 6, "--concurrency", 1, "--warmup", 2]
        found = {"one": {}, "rates": []}
        rows = {rate: {"rate": rate} for rate in rates}
        count = lambda rate: max(3, int(rate * seconds))

        ports, servers = zip(*[self.server(f"aggregated-{gpu}", gpu, self.quiet) for gpu in (0, 1)])
        with servers[0], servers[1]:
            for server, port in zip(servers, ports):
                ready(server, port, 60)
            found["one"]["aggregated"] = self.once("aggregated-one", ports[0], alone)
            for rate in rates:
                halves = [self.load(f"aggregated-{rate}-{gpu}", ports[gpu],
                                    ["--request-rate", rate / 2, "--num-prompts", count(rate / 2), "--warmup", 1, "--seed", gpu]) for gpu in (0, 1)]
                with halves[0][0], halves[1][0]:
                    rows[rate]["aggregated"] = [self.measured(*half) for half in halves]
                print("aggregated", rate, [round(half["itl_ms"]["p99"], 2) for half in rows[rate]["aggregated"]], flush=True)

        config = self.folder / "transfer.yaml"
        config.write_text("kv_cache_config:\n  enable_block_reuse: false\ncache_transceiver_config:\n  backend: DEFAULT\n")
        (context, first), (generation, second) = self.server("context", 0, config), self.server("generation", 1, config)
        port, front = next(PORTS), self.folder / "deployment.yaml"
        front.write_text(f"hostname: 127.0.0.1\nport: {port}\ncontext_servers: {{num_instances: 1, urls: ['127.0.0.1:{context}']}}\n"
                         f"generation_servers: {{num_instances: 1, urls: ['127.0.0.1:{generation}']}}\n")
        with first, second:
            ready(first, context, 60)
            ready(second, generation, 60)
            with Process(self.log("proxy"), [BATON, "disaggregated", "-c", front]) as proxy:
                ready(proxy, port, 30)
                found["one"]["disaggregated"] = self.once("disaggregated-one", port, alone)
                print("one", {name: [round(one["ttft_ms"]["p50"], 2), round(one["itl_ms"]["p50"], 3), round(one["itl_ms"]["p99"], 3)] for name, one in found["one"].items()}, flush=True)
                for rate in rates:
                    words = ["--request-rate", rate, "--num-prompts", count(rate), "--warmup", 1]
                    rows[rate]["disaggregated"] = self.once(f"disaggregated-{rate}", port, words)
                    print("disaggregated", rate, round(rows[rate]["disaggregated"]["itl_ms"]["p99"], 2), flush=True)
                pairs = (ask(generation, "/server_info").get("transport") or {}).get("rank_pairs")
                found["pairs"] = pairs
        found["rates"] = list(rows.values())
        one = {name: one["ttft_ms"]["p50"] for name, one in found["one"].items()}
        found["ttft_more_percent"] = round(100 * (one["disaggregated"] / one["aggregated"] - 1), 2)
        self.plot(found)
        return found

    def plot(self, found):
        """99th percentile of the time between tokens over the rate, of both."""
        try:
            import matplotlib
            matplotlib.use("svg")
            import matplotlib.pyplot as plot
        except ImportError as error:
            print("no plot:", error)
            return
        matplotlib.rcParams["svg.fonttype"] = "none"
        figure, axes = plot.subplots(figsize=(6, 3.6))
        rates = [row["rate"] for row in found["rates"]]
        axes.plot(rates, [max(half["itl_ms"]["p99"] for half in row["aggregated"]) for row in found["rates"]], "o-", label="two aggregated servers")
        axes.plot(rates, [row["disaggregated"]["itl_ms"]["p99"] for row in found["rates"]], "s-", label="1 context + 1 generation")
        unloaded = found["one"]["aggregated"]["itl_ms"]["p99"]
        axes.axhline(2 * unloaded, color="grey", linestyle=":", label="twice an idle aggregated server's")
        axes.set(xlabel="requests a second, both GPUs together", ylabel="ITL, 99th percentile (ms)", yscale="log", title="8,192 in / 256 out, Llama-3.1-8B shape, bf16")
        axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(self.folder / "itl.svg")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--golden", required=True)
    parser.add_argument("--steps", default="golden,handoff,refusal,loss,decode,deploy")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rates", default="0.5,1,2,3")
    parser.add_argument("--seconds", type=float, default=14)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    rates = [float(rate) for rate in arguments.rates.split(",")]
    acts = {"golden": bench.grids, "handoff": bench.handoffs, "refusal": bench.refusal, "loss": bench.loss, "decode": bench.decode,
            "deploy": lambda: bench.deploy(rates, arguments.seconds)}
    for name in arguments.steps.split(","):
        bench.step(name, acts[name])
    sys.exit(any("failed" in json.dumps(one) for one in bench.results.values()))


if __name__ == "__main__":
    main()
