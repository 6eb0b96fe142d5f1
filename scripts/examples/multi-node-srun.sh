#!/usr/bin/env bash
# A context server and a generation server, each over its own nodes by one srun, and the proxy by a third. No host name is
# filled in anywhere: each server's first rank writes its address to a file that the proxy reads.
# MODEL=… CTX_TP=8 GEN_TP=4 [CTX_NODES=2 GEN_NODES=1] scripts/examples/multi-node-srun.sh, inside `salloc -N 3` or on a
# login node; scripts/examples/README.md lists the variables.
set -euo pipefail

model=${MODEL:?set MODEL to a GGUF file, a Hugging Face directory or a model id}
work=${WORK:-$PWD/baton-example}
baton=${BATON:-baton}
launch=${LLMAPI_LAUNCH:-llmapi-launch}
mkdir -p "$work"
rm -f "$work"/*.addr

cat >"$work/engine.yaml" <<YAML
cache_transceiver_config:
  backend: DEFAULT
${ENGINE:-}
YAML
cat >"$work/disagg_config.yaml" <<YAML
hostname: 0.0.0.0
port: ${PORT:-8000}
model: "$model"
context_servers:
  num_instances: 1
  urls: ["file:ctx0.addr"]
generation_servers:
  num_instances: 1
  urls: ["file:gen0.addr"]
YAML

# USR1 is what srun hands on to its tasks, and they drain on it; on TERM it would kill them at once.
trap 'trap - EXIT; kill -USR1 $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
trap 'exit 0' USR1

# serve NAME ROLE NODES RANKS
serve() {
    # shellcheck disable=SC2086 # several words on purpose
    srun --overlap -N "$3" -n "$4" --mpi="${MPI_TYPE:-pmix}" --job-name="$1" ${SRUN_ARGS:-} \
        "$launch" "$baton" serve "$model" --tp_size "$4" --host 0.0.0.0 --port 0 \
        --report_addr "$work/$1.addr" --server_role "$2" --config "$work/engine.yaml" &>"$work/$1.log" &
}
serve ctx0 CONTEXT "${CTX_NODES:-1}" "${CTX_TP:-1}"
serve gen0 GENERATION "${GEN_NODES:-1}" "${GEN_TP:-1}"
# shellcheck disable=SC2086 # several words on purpose
srun --overlap -N 1 -n 1 --job-name=proxy ${SRUN_ARGS:-} \
    "$baton" disaggregated -c "$work/disagg_config.yaml" --report_addr "$work/proxy.addr" \
    --server_start_timeout "${START_TIMEOUT:-1800}" &

# The first srun that ends, ends the example.
wait -n
