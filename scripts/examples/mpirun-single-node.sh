#!/usr/bin/env bash
# Two context servers and a generation server as one MPI world, contexts first; the proxy runs beside rank 0.
# MODEL=… [PORT=8000] scripts/examples/mpirun-single-node.sh; scripts/examples/README.md lists the variables.
# RANKS is the sum of all servers' ranks: with CTX_TP=2 and GEN_TP=2 it is 6.
set -euo pipefail

model=${MODEL:?set MODEL to a GGUF file, a Hugging Face directory or a model id}
work=${WORK:-$PWD/baton-example}
mkdir -p "$work"

cat >"$work/disagg_config.yaml" <<YAML
hostname: localhost
port: ${PORT:-8000}
model: "$model"
${ENGINE:-}
context_servers:
  num_instances: 2
  tensor_parallel_size: ${CTX_TP:-1}
  cache_transceiver_config: {backend: DEFAULT}
generation_servers:
  num_instances: 1
  tensor_parallel_size: ${GEN_TP:-1}
  cache_transceiver_config: {backend: DEFAULT}
YAML

# shellcheck disable=SC2086 # several words on purpose
exec mpirun ${MPIRUN_ARGS:-} -n "${RANKS:-3}" "${BATON:-baton}" disaggregated_mpi_worker -c "$work/disagg_config.yaml"
