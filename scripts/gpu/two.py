#!/usr/bin/env python3
"""What several ranks and a deployment do on two GPUs, or on four, in one go: the golden answers on several ranks and through hand-offs
between devices, a rank that dies, a peer that dies or stands still while its KV is read, decoding on one GPU and several, and one
deployment beside an aggregated server. Every step has a time limit, and what fails does not stop the rest.

Usage: two.py FOLDER --golden DIR [--steps golden,handoff,peers,loss,decode,deploy] [--gpus 4] [--device cuda|cpu] [--small]
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
# What a worker holds for hand-offs, and what it has counted.
HELD = ["baton_kv_blocks_used", "baton_kv_blocks_pinned", "baton_kv_blocks_lent", "baton_kv_blocks_quarantined", "baton_kv_leases"]
COUNTED = ["baton_handoffs_prefilled_again_total", "baton_handoffs_fetched_total", "baton_kv_received_bytes_total"]
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
        self.golden, self.device, self.small, self.gpus = pathlib.Path(arguments.golden).resolve(), arguments.device, arguments.small, arguments.gpus
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

    def tiny(self, name, model, device, grid=(1, 1), gpu=None, more="", extra=(), tokens=4096):
        """A server of a tiny model on TP x PP ranks; on one GPU, or on as many as there are."""
        port = next(PORTS)
        config = self.folder / f"{name}.yaml"
        dtype = f"kv_cache_config: {{max_tokens: {tokens}, enable_block_reuse: false, dtype: float16}}\n"
        config.write_text(f"max_seq_len: 512\nmax_batch_size: 4\ntensor_parallel_size: {grid[0]}\npipeline_parallel_size: {grid[1]}\n{dtype}{more}")
        env = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
        words = [BATON, "serve", self.golden / f"tiny-{model}", "--host", "127.0.0.1", "--port", port, "--device", device, "--config", config, *extra]
        return port, Process(self.log(name), words, env)

    def answers(self, port, model):
        """How much of the golden answers came, and how far the log-probabilities are off. A wrong token is an error."""
        compared, off, rows = 0, 0.0, []
        for item in self.items(model):
            choice = self.asked(port, item)
            probabilities = (choice.get("logprobs") or {}).get("token_logprobs") or []
            rows.append([choice["token_ids"], probabilities])
            right = self.right(item, choice["token_ids"])
            compared += right
            off = max([off, *(abs(probabilities[at] - item["logprobs"][at]) for at in range(min(right, len(probabilities))))])
        if off > LOGPROB:
            raise RuntimeError(f"log-probabilities are off by {off:.3f}")
        return {"tokens_compared": compared, "logprob_off": round(off, 4)}, rows

    def items(self, model):
        return json.loads((self.golden / "tiny.json").read_text())["models"][model]

    @staticmethod
    def asked(port, item, timeout=60):
        return ask(port, "/v1/completions", {"model": "m", "prompt": item["prompt_token_ids"], "max_tokens": len(item["output_token_ids"]), "temperature": 0,
                                             "ignore_eos": True, "detokenize": False, "logprobs": 1}, timeout)["choices"][0]

    @staticmethod
    def right(item, ids):
        """How many tokens of an answer have to be the golden ones, and are. A wrong one is an error."""
        # Of the later tokens only the smallest margin is known.
        sure = len(item["top5"]) if item["min_margin"] < MARGIN else len(item["output_token_ids"])
        for at, expected in enumerate(item["output_token_ids"][:sure]):
            best = item["top5"][at] if at < len(item["top5"]) else None
            if best and best[0][1] - best[1][1] < MARGIN:
                return at
            if at >= len(ids) or ids[at] != expected:
                raise RuntimeError(f"token {at} of {item['prompt']!r}: {ids[:at + 1]} instead of {item['output_token_ids'][:at + 1]}")
        return sure

    def grids(self):
        """The same answers on one GPU, and on tensor ranks, stages and both."""
        grids = [((1, 1), None), ((2, 1), None), ((2, 1), "nccl"), ((1, 2), None)]
        if self.gpus == 4:
            grids = [((4, 1), None), ((4, 1), "nccl"), ((2, 2), None), ((1, 4), None)]
        cases = [(model, grid, way) for model in ("llama", "qwen3") for grid, way in grids]

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
        if self.gpus == 4:
            grids = {"tp1": (1, 1), "tp2": (2, 1), "pp2": (1, 2), "tp4": (4, 1), "tp2pp2": (2, 2)}
            pairs = [("tp4", "tp2"), ("tp2pp2", "tp4"), ("tp4", "tp2pp2"), ("tp1", "tp4"), ("tp4", "pp2")]
            cases = [(f"{one}-to-{other}", (gpu, grids[one], None), (gpu, grids[other], None)) for one, other in pairs]

        def run(case):
            name, context, generation = case
            transfer = "cache_transceiver_config: {backend: DEFAULT}\n"
            try:
                ports, processes = zip(*[self.tiny(f"handoff-{name}-{side}", "llama", *place, more=transfer)
                                         for side, place in (("context", context), ("generation", generation))])
                port, front = self.front(f"handoff-{name}", *ports)
                with processes[0] as first, processes[1] as second:
                    ready(first, ports[0], 60)
                    ready(second, ports[1], 60)
                    with front as proxy:
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

    # === peers that fail ===

    def gauges(self, port, names):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/prometheus/metrics", timeout=5) as answer:
            lines = [line.split() for line in answer.read().decode().splitlines() if line and line[0] != "#"]
        return {line[0].removeprefix("baton_"): float(line[1]) for line in lines if line[0] in names}

    def until(self, what, limit, test):
        end = time.monotonic() + limit
        while time.monotonic() < end:
            found = test()
            if found:
                return found
            time.sleep(0.02)
        raise RuntimeError(f"{what}: not in {limit} s")

    def gpu_mib(self):
        words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return [int(line) for line in subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.split()] if self.device == "cuda" else []

    def nothing_held(self, port):
        """How soon all blocks and leases of a worker are back."""
        begun = time.monotonic()
        self.until(f"blocks of {port} come back", 40, lambda: not any(self.gauges(port, HELD).values()))
        return round(time.monotonic() - begun, 2)

    def front(self, name, context, generation):
        port, front = next(PORTS), self.folder / f"{name}-front.yaml"
        front.write_text(f"hostname: 127.0.0.1\nport: {port}\ncontext_servers: {{num_instances: 1, urls: ['127.0.0.1:{context}']}}\n"
                         f"generation_servers: {{num_instances: 1, urls: ['127.0.0.1:{generation}']}}\n")
        return port, Process(self.log(f"{name}-proxy"), [BATON, "disaggregated", "-c", front])

    def peer(self, name, what):
        """A context server is killed or stopped while one of its GPU's pages is being read: its KV stops in the middle, by a test's plan.
        Prompts are read again, what was held comes back, the generation server goes on; so does the context server, or one in its place."""
        pool, transfer = 500_000 if self.device == "cuda" else 4096, "cache_transceiver_config: {backend: DEFAULT, kv_transfer_timeout_ms: 15000}\n"
        make = lambda side, gpu: self.tiny(f"peer-{name}-{side}", "llama", self.device, gpu=gpu, more=transfer, tokens=pool)
        (context, first), (generation, second) = make("context", 0), make("generation", 1)
        first.env["BATON_TEST_TRANSPORT_FAULT"] = "stall_after_bytes=10000"
        port, proxy = self.front(f"peer-{name}", context, generation)
        found, items = {"gpu_mib": [self.gpu_mib()]}, self.items("llama")[:2]

        def one(item):
            begun = time.monotonic()
            try:
                return ["right", self.right(item, self.asked(port, item)["token_ids"]), round(time.monotonic() - begun, 2)]
            except OSError as error:
                return ["told", f"{error}"[:120], round(time.monotonic() - begun, 2)]

        with first, second, proxy:
            for process, at in ((first, context), (second, generation), (proxy, port)):
                ready(process, at, 60)
            found["gpu_mib"].append(self.gpu_mib())
            with concurrent.futures.ThreadPoolExecutor(4) as threads:
                asked = [threads.submit(one, item) for item in items]
                # The first piece holds up all others of its connection.
                held = lambda at, what: self.gauges(at, HELD).get(what, 0)
                self.until("KV is being read", 20, lambda: held(generation, "kv_blocks_lent") and held(context, "kv_leases") == len(items))
                os.kill(first.child.pid, what)
                found["outcomes"] = [one.result() for one in asked]
            found["generation_back_s"] = self.nothing_held(generation)
            found["counted"] = self.gauges(generation, COUNTED)
            if not found["counted"].get("handoffs_prefilled_again_total"):
                raise RuntimeError(f"no prompt was read again: {found}")
            if what == signal.SIGKILL and self.device == "cuda":
                # The dead one's memory, which the survivor had mapped, goes back while that serves on.
                begun = time.monotonic()
                self.until("memory of the dead process goes back", 15, lambda: self.gpu_mib()[0] < found["gpu_mib"][1][0] / 2)
                found["memory_back_s"] = round(time.monotonic() - begun, 2)
            found["gpu_mib"].append(self.gpu_mib())
            found["survivor"] = sum(self.right(item, self.asked(generation, item)["token_ids"]) for item in items)
            if what == signal.SIGSTOP:
                os.kill(first.child.pid, signal.SIGCONT)
                found["context_back_s"] = self.nothing_held(context)
                found["after"] = self.until("an answer", 30, lambda: (lambda outcome: outcome[0] == "right" and outcome)(one(items[0])))
            else:
                again = Process(self.log(f"peer-{name}-again"), first.words)
                with again:
                    ready(again, context, 60)
                    before = self.gauges(generation, COUNTED).get("kv_received_bytes_total", 0)
                    found["after"], _ = self.answers(port, "llama")
                    found["bytes_after"] = self.gauges(generation, COUNTED)["kv_received_bytes_total"] - before
                    if not found["bytes_after"]:
                        raise RuntimeError(f"no KV came afterwards: {found}")
                    found["context_back_s"] = self.nothing_held(context)
            found["pairs"] = [[pair["peer_rank"], pair["rank"], pair["transport"]] for pair in (ask(generation, "/server_info").get("transport") or {}).get("rank_pairs") or []]
        return found

    def peer_under_load(self):
        """A context server is killed under load, with nothing to hold up what goes on: every client is answered or told."""
        config = self.folder / "load-peer.yaml"
        config.write_text("kv_cache_config:\n  enable_block_reuse: false\n  free_gpu_memory_fraction: 0.5\ncache_transceiver_config:\n  backend: DEFAULT\n")
        (context, first), (generation, second) = self.server("load-context", 0, config), self.server("load-generation", 1, config)
        port, proxy = self.front("load", context, generation)
        vocab, length = (1000, 200) if self.small else (128256, 2048)

        def one(number):
            prompt = [(7 + number * 131 + at * 37) % vocab for at in range(length)]
            try:
                return len(ask(port, "/v1/completions", {"model": "m", "prompt": prompt, "max_tokens": 64, "temperature": 0, "ignore_eos": True, "detokenize": False})["choices"][0]["token_ids"])
            except OSError as error:
                return f"{error}"[:80]

        with first, second, proxy:
            for process, at in ((first, context), (second, generation), (proxy, port)):
                ready(process, at, 60)
            with concurrent.futures.ThreadPoolExecutor(24) as threads:
                asked = [threads.submit(one, number) for number in range(24)]
                self.until("KV has come", 20, lambda: self.gauges(generation, COUNTED).get("handoffs_fetched_total", 0) >= 6)
                os.kill(first.child.pid, signal.SIGKILL)
                outcomes = [one.result() for one in asked]
            found = {"answered": sum(one == 64 for one in outcomes), "told": sorted({one for one in outcomes if one != 64}, key=str), "counted": self.gauges(generation, COUNTED)}
            found["generation_back_s"] = self.nothing_held(generation)
            found["gpu_mib"] = self.gpu_mib()
            found["survivor"] = len(ask(generation, "/v1/completions", {"model": "m", "prompt": [5, 6, 7], "max_tokens": 8, "ignore_eos": True, "detokenize": False})["choices"][0]["token_ids"])
            return found

    def peers(self):
        def act(name, do):
            try:
                return name, do()
            except Exception as error:
                return name, {"failed": f"{type(error).__name__}: {error}"[-1200:]}

        found = [act("killed", lambda: self.peer("killed", signal.SIGKILL))]
        # A peer that stands still is waited for.
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            both = [pool.submit(act, "stopped", lambda: self.peer("stopped", signal.SIGSTOP)), pool.submit(act, "under_load", self.peer_under_load)]
            return dict([*found, *(one.result() for one in both)])

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
        if self.gpus == 4:
            four = ["--tp_size", 4]
            rows = [rows[0], ("tp4", four, {}), ("tp4-nccl", four, {"BATON_DEVICE_SUMS": "nccl"}), ("tp2pp2", ["--tp_size", 2, "--pp_size", 2], {})]
        found = {}
        for name, words, env in rows:
            for load, loaded in (("1", one), ("16", many), ("prompt", prompt))[: 1 if "nccl" in name else 3 if self.gpus == 2 else 2]:
                try:
                    found[f"{name} x{load}"] = self.offline(f"decode-{name}-{load}", [*words, *loaded], env)
                except Exception as error:
                    found[f"{name} x{load}"] = {"failed": str(error)[-900:]}
        for load, what in (("1", "itl_p50_ms"), ("16", "itl_p50_ms"), ("prompt", "ttft_p50_ms")):
            more = f"tp{self.gpus}"
            one, two = (found[f"{name} x{load}"].get(what) for name in ("tp1", more))
            if one and two:
                found[f"{more}/tp1 x{load}"] = round(one / two, 3)
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
        port, front = self.front("deployment", context, generation)
        with first, second:
            ready(first, context, 60)
            ready(second, generation, 60)
            with front as proxy:
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
    parser.add_argument("--steps", default="golden,handoff,refusal,peers,loss,decode,deploy")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gpus", type=int, choices=(2, 4), default=2)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rates", default="0.5,1,2,3")
    parser.add_argument("--seconds", type=float, default=14)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    rates = [float(rate) for rate in arguments.rates.split(",")]
    acts = {"golden": bench.grids, "handoff": bench.handoffs, "refusal": bench.refusal, "loss": bench.loss, "peers": bench.peers, "decode": bench.decode,
            "deploy": lambda: bench.deploy(rates, arguments.seconds)}
    for name in arguments.steps.split(","):
        bench.step(name, acts[name])
    sys.exit(any("failed" in json.dumps(one) for one in bench.results.values()))


if __name__ == "__main__":
    main()
