#!/usr/bin/env python3
"""How fast weights come from files to GPUs: a checkpoint of several GiB of Llama-3.1-8B's shape in bf16, loaded with the page cache empty
and full, on one GPU and on two ranks, by `baton` beside this file and by an earlier one (`baton-before`) if it is there. What the files
themselves give, read by one thread and by sixteen, is the bound.

Usage: load.py FOLDER [--layers 16] [--scratch DIR]
Writes load.json. DIR is on the disk that is to be measured; what is put there is removed.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
PIECE = 4 << 20
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}


def checkpoint(folder, layers):
    """Writes random weights; gives their bytes."""
    width, ffn, vocab, kv = 4096, 14336, 128256, 1024
    shapes = {"model.embed_tokens.weight": [vocab, width], "model.norm.weight": [width], "lm_head.weight": [vocab, width]}
    for layer in range(layers):
        for name, shape in (("input_layernorm", [width]), ("post_attention_layernorm", [width]), ("self_attn.q_proj", [width, width]), ("self_attn.k_proj", [kv, width]),
                            ("self_attn.v_proj", [kv, width]), ("self_attn.o_proj", [width, width]), ("mlp.gate_proj", [ffn, width]), ("mlp.up_proj", [ffn, width]), ("mlp.down_proj", [width, ffn])):
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # Every second byte holds sign and exponent: small numbers of either sign.
    noise = bytearray(os.urandom(64 << 20))
    noise[1::2] = bytes((0x3C if byte & 1 else 0xBC) for byte in noise[1::2])
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = at
        while left:
            left -= file.write(noise[: min(left, len(noise))])
        file.flush()
        os.fsync(file.fileno())
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    return at


def forget(path):
    """Takes a file out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain(path, threads):
    """GB/s of reading the file and nothing else."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        def part(first):
            buffer = bytearray(PIECE)
            for at in range(first * PIECE, size, threads * PIECE):
                os.preadv(file.fileno(), [buffer], at)
        begun = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(part, range(threads)))
        return round(size / 1e9 / (time.monotonic() - begun), 2)


def load(binary, folder, name, out, words):
    """Starts the engine alone on the checkpoint; how long until it is ready, and what it says of loading."""
    report, log = out / f"{name}.json", out / f"{name}.log"
    report.unlink(missing_ok=True)
    command = [binary, "bench", "serve", "--offline", folder, "--device", "cuda", "--max-seq-len", 1024, "--max-batch-size", 8, "--isl", 16, "--osl", 4, "--num-prompts", 1,
               "--concurrency", 1, "--warmup", 0, "--accept", "short,warmup,length,saturated", "--json", report, *words]
    with open(log, "wb") as file:
        done = subprocess.run([str(word) for word in command], stdout=file, stderr=subprocess.STDOUT, timeout=150, env={**os.environ, "BATON_LOG": "info"})
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    if done.returncode:
        return {"failed": text[-900:]}
    said = [{key: float(value) for key, value in re.findall(r"(\w+)=([0-9.]+)", line)} for line in text.splitlines() if "loaded the weights" in line]
    return {"ready_s": round(json.loads(report.read_text())["target"]["start"]["ready_s"], 2), "said": said}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--scratch")
    arguments = parser.parse_args()
    out = pathlib.Path(arguments.folder).resolve()
    out.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(dir=arguments.scratch))
    found = {"rows": []}
    try:
        begun = time.monotonic()
        size = checkpoint(folder, arguments.layers)
        file = folder / "model.safetensors"
        found |= {"gb": round(size / 1e9, 3), "written_s": round(time.monotonic() - begun, 1), "file_system": subprocess.run(["df", "-T", folder], stdout=subprocess.PIPE, text=True).stdout.split("\n")[1]}
        found["plain_warm_gb_per_s"] = {threads: plain(file, threads) for threads in (1, 16)}
        for threads in (1, 16):
            forget(file)
            found.setdefault("plain_cold_gb_per_s", {})[threads] = plain(file, threads)
        binaries = [(name, HERE / name) for name in ("baton-before", "baton") if (HERE / name).exists()]
        for ranks, words in ((1, []), (2, ["--tp_size", 2])):
            for name, binary in binaries:
                # The first start may compile kernels.
                found["rows"].append({"binary": name, "ranks": ranks, "weights": "dummy", **load(binary, folder, f"load-{name}-{ranks}-dummy", out, [*words, "--load-format", "dummy"])})
                for state in ("warm", "warm", "cold"):
                    if state == "cold":
                        forget(file)
                    row = load(binary, folder, f"load-{name}-{ranks}-{state}", out, words)
                    found["rows"].append({"binary": name, "ranks": ranks, "cache": state, **row})
                    print(json.dumps(found["rows"][-1]), flush=True)
                    (out / "load.json").write_text(json.dumps(found, indent=1) + "\n")
    finally:
        shutil.rmtree(folder)
        (out / "load.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "rows"}))


if __name__ == "__main__":
    main()
