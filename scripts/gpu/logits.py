#!/usr/bin/env python3
"""Compares the engine with Hugging Face transformers on a GPU: small random Llama, Qwen2, Qwen3 and Mistral checkpoints, logits of a
prompt of 300 tokens and of 64 steps behind it, in one chunk and in several, with KV in 16 and in 8 bits.

Needs PyTorch, transformers, and engine-tests beside this file (scripts/gpu/pack). Writes logits.json into the folder given.
Usage: logits.py FOLDER
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

# Both sides hold weights in bf16; the reference computes in f32, the engine rounds activations to bf16 some dozen times on the
# way through four layers. Of the greatest logit, as everywhere in the tests: random weights give logits of about one size.
TOLERANCE = 0.04
# With KV in e4m3 the reference's keys and values are rounded to that too. One in some dozens lies so near the middle between two
# that what bf16 has left of it is rounded the other way, which is an eighth of it.
TOLERANCE_KV_8_BITS = 0.10
PROMPT, STEPS = 300, 64

COMMON = dict(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=4,
    vocab_size=1000,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    initializer_range=0.05,
)
MODELS = {
    "llama": LlamaConfig(**COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=128),
    "qwen2": Qwen2Config(**COMMON, num_attention_heads=8, num_key_value_heads=2),
    "qwen3": Qwen3Config(**COMMON, num_attention_heads=8, num_key_value_heads=2, head_dim=128),
    "mistral": MistralConfig(**COMMON, num_attention_heads=4, num_key_value_heads=1, head_dim=128, sliding_window=200),
}


def checkpoint(config, folder):
    """A model with random weights, norms and biases included, saved in bf16."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5) if "norm" in name else weight.uniform_(-0.5, 0.5)
    model.to(torch.bfloat16).save_pretrained(folder)


class Rounding(DynamicCache):
    """Keys and values as pages in e4m3 hold them."""

    def update(self, keys, values, *args, **kwargs):
        held = [x.to(torch.float8_e4m3fn).to(x.dtype) for x in (keys, values)]
        return super().update(*held, *args, **kwargs)


def reference(folder, tokens, dtype, cache=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").cuda().eval()
    with torch.no_grad():
        return model(torch.tensor([tokens], device="cuda"), past_key_values=cache).logits[0].float().cpu()


def ours(folder, tokens, chunk, kv):
    run = {"tokens": tokens, "prompt": PROMPT, "chunk": chunk, "kv": kv}
    (folder / "run.json").write_text(json.dumps(run))
    tests = Path(__file__).resolve().parent / "engine-tests"
    name = "backend::cuda::tests::logits::logits_of_a_checkpoint"
    environment = dict(os.environ, BATON_TEST_GPU="1", BATON_TEST_CHECKPOINT=str(folder))
    subprocess.run([tests, name, "--exact", "--ignored"], env=environment, check=True, timeout=120, stdout=subprocess.DEVNULL)
    return torch.frombuffer(bytearray((folder / "logits.f32").read_bytes()), dtype=torch.float32).reshape(len(tokens), -1)


def off_by(found, expected):
    """The greatest error, of the greatest logit; of the prompt and of the steps behind it. NaN stays NaN."""
    errors = (found - expected).abs() / expected.abs().max()
    return errors[:PROMPT].max().item(), errors[PROMPT:].max().item()


def main():
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    results, failed = [], False
    for name, config in MODELS.items():
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            checkpoint(config, folder)
            tokens = torch.randint(0, 1000, (PROMPT + STEPS,), generator=torch.Generator().manual_seed(2)).tolist()
            expected = reference(folder, tokens, torch.float32)
            same = off_by(reference(folder, tokens, torch.bfloat16), expected)
            print(f"{name}: transformers in bf16 is off by {same[0]:.4f}, {same[1]:.4f} of its f32")
            rounded = reference(folder, tokens, torch.float32, Rounding())
            rounding = off_by(rounded, expected)
            print(f"{name}: KV in e4m3 is {rounding[0]:.4f}, {rounding[1]:.4f} of it")
            for kv, against, tolerance in (("bf16", expected, TOLERANCE), ("f16", expected, TOLERANCE), ("fp8", rounded, TOLERANCE_KV_8_BITS)):
                for chunk in (PROMPT, 128, 50):
                    prompt, steps = off_by(ours(folder, tokens, chunk, kv), against)
                    good = prompt <= tolerance and steps <= tolerance
                    failed |= not good
                    results.append(dict(model=name, kv=kv, chunk=chunk, prompt=prompt, steps=steps, tolerance=tolerance, good=good))
                    print(f"{name}, kv {kv}, chunks of {chunk}: prompt off by {prompt:.4f}, steps by {steps:.4f}{'' if good else ' TOO MUCH'}")
            results.append(dict(model=name, transformers="bf16", prompt=same[0], steps=same[1]))
    (out / "logits.json").write_text(json.dumps(results, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
