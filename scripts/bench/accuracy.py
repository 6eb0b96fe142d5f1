"""How far the fast default (dtype: auto) is from the float32 reference, teacher-forced over tests/golden/smollm2.json.

Usage: scripts/bench-accuracy [--dtype auto|float32|float16|bfloat16]. Each item's prompt and answer are read as one
prompt with their log-probabilities (echo), so that every position sees the reference's own tokens. At the end the server's
resident memory is set against the weights' and the pool's size.
"""

import argparse
import json
import pathlib
import statistics
import tempfile

import common


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    golden = json.loads((common.ROOT / "tests/golden/smollm2.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder) / "options.yaml"
        config.write_text(json.dumps({"dtype": arguments.dtype, "max_seq_len": 2048, "kv_cache_config": {"max_tokens": 8192}}))
        model = common.model_path()
        with common.process(["serve", model, "--host", "127.0.0.1", "--port", "0", "--config", str(config)]) as server:
            deltas, agree = [], []
            for item in golden["items"]:
                one_item(server.address, item, deltas, agree)
            resident = server.resident_bytes()
            layout = common.get(server.address, "/server_info")["kv_layout"]
    weights, pool = pathlib.Path(model).stat().st_size, layout["page_bytes"] * (8192 // layout["tokens_per_block"])
    deltas.sort()
    result = {
        "dtype": arguments.dtype, "positions": len(deltas), "mean_abs_delta_logprob": statistics.fmean(deltas),
        "p99": deltas[int(len(deltas) * 0.99)], "max": deltas[-1], "argmax_agreement": sum(agree) / len(agree),
        "resident_bytes": resident, "weight_bytes": weights, "pool_bytes": pool,
    }
    print(f"dtype {arguments.dtype}: mean |delta logprob| {result['mean_abs_delta_logprob']:.6f} (target 0.030), "
          f"p99 {result['p99']:.5f}, max {result['max']:.5f}, argmax equal {100 * result['argmax_agreement']:.2f} % (target 97.5) of {len(agree)}")
    print(f"resident {resident / 1e6:.0f} MB; weights {weights / 1e6:.0f} MB, pool {pool / 1e6:.0f} MB (target: at most 2 x weights + pool = "
          f"{(2 * weights + pool) / 1e6:.0f} MB)")
    common.keep(f"accuracy-{arguments.dtype}", result)


def one_item(address, item, deltas, agree):
    prompt, output = item["prompt_token_ids"], item["output_token_ids"]
    body = {"model": "m", "prompt": prompt + output, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1,
            "ignore_eos": True}
    answer = common.post(address, "/v1/completions", body)["choices"][0]["logprobs"]
    for index, (token, logprob) in enumerate(zip(output, item["logprobs"])):
        seen = answer["token_logprobs"][len(prompt) + index]
        best = max(answer["top_logprobs"][len(prompt) + index].values())
        deltas.append(abs(seen - logprob))
        agree.append(seen >= best)


if __name__ == "__main__":
    main()
