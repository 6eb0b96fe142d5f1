"""What disaggregation itself costs: TTFT through proxy, context, hand-off and generation, minus one aggregated server's.

Usage: scripts/bench-handoff [--requests N]. Both deployments stay up; requests alternate between them, each prompt is
new (no prefix is ever reused), one request at a time.
"""

import argparse
import json
import pathlib
import random
import statistics
import tempfile

import common

PROMPT = 512


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=50)
    arguments = parser.parse_args()
    model = common.model_path()
    engine = {"max_batch_size": 8, "max_seq_len": 2048, "kv_cache_config": {"max_tokens": 16384}}
    layout = {"model": model, "engine": engine, "context": {"instances": 1}, "generation": {"instances": 1}}
    with tempfile.TemporaryDirectory() as folder:
        config, layout_file = pathlib.Path(folder) / "options.yaml", pathlib.Path(folder) / "layout.yaml"
        config.write_text(json.dumps(engine))
        layout_file.write_text(json.dumps(layout))
        serve = ["serve", model, "--host", "127.0.0.1", "--port", "0", "--config", str(config)]
        with common.process(serve) as aggregated, common.process(["up", "-c", str(layout_file)]) as deployment:
            compare(aggregated.address, deployment.address, arguments.requests)


def compare(aggregated, deployment, requests):
    rng = random.Random(11)

    def ttft(address):
        tokens = [rng.randrange(1000, 40000) for _ in range(PROMPT)]
        body = {"model": "m", "prompt": tokens, "max_tokens": 2, "temperature": 0, "ignore_eos": True, "detokenize": True}
        return common.stream(address, body)[0] * 1e3

    for address in (aggregated, deployment):
        for _ in range(3):
            ttft(address)
    pairs = []
    for index in range(requests):
        order = (aggregated, deployment) if index % 2 == 0 else (deployment, aggregated)
        seen = {address: ttft(address) for address in order}
        pairs.append((seen[aggregated], seen[deployment]))
    plain, split = [p[0] for p in pairs], [p[1] for p in pairs]
    cost = statistics.median(split) - statistics.median(plain)
    print(f"TTFT of {PROMPT} tokens, median of {requests}: aggregated {statistics.median(plain):.1f} ms, deployment {statistics.median(split):.1f} ms")
    print(f"disaggregation's own cost: {cost:.1f} ms at the medians (target 15), {statistics.median(s - p for p, s in pairs):.1f} ms at the median pair")
    common.keep("handoff-cost", {"ttft_ms_pairs": pairs, "cost_ms": cost})


if __name__ == "__main__":
    main()
