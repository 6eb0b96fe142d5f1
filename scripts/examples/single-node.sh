#!/usr/bin/env bash
# Two context servers, a generation server and the proxy on this machine, each a process of its own.
# MODEL=… [PORT=8000] scripts/examples/single-node.sh; scripts/examples/README.md lists the variables.
set -euo pipefail

model=${MODEL:?set MODEL to a GGUF file, a Hugging Face directory or a model id}
port=${PORT:-8000}
work=${WORK:-$PWD/baton-example}
baton=${BATON:-baton}
mkdir -p "$work"
rm -f "$work"/*.addr

cat >"$work/engine.yaml" <<YAML
cache_transceiver_config:
  backend: DEFAULT
${ENGINE:-}
YAML
cat >"$work/disagg_config.yaml" <<YAML
hostname: localhost
port: $port
model: "$model"
context_servers:
  num_instances: 2
  urls: ["file:ctx0.addr", "file:ctx1.addr"]
generation_servers:
  num_instances: 1
  urls: ["file:gen0.addr"]
YAML

trap 'trap - EXIT; kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

# serve NAME ROLE RANKS DEVICES: the kernel chooses the port, and the file tells the proxy.
serve() {
    CUDA_VISIBLE_DEVICES=$4 "$baton" serve "$model" --tp_size "$3" --host localhost --port 0 \
        --report_addr "$work/$1.addr" --server_role "$2" --config "$work/engine.yaml" &>"$work/$1.log" &
}
serve ctx0 CONTEXT "${CTX_TP:-1}" "${CTX0_DEVICES:-0}"
serve ctx1 CONTEXT "${CTX_TP:-1}" "${CTX1_DEVICES:-1}"
serve gen0 GENERATION "${GEN_TP:-1}" "${GEN_DEVICES:-2}"
"$baton" disaggregated -c "$work/disagg_config.yaml" --report_addr "$work/proxy.addr" &

# The first process that ends, ends the example.
wait -n
