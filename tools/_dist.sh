# Sourced by dist_train.sh and dist_test.sh.

TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# launch PROCESSES SCRIPT [arguments]: start a script of this folder in so many processes.
launch() {
    local nodes
    if [ "${NNODES:-1}" = 1 ] && [ -z "${PORT:-}" ]; then
        # Two runs on one machine do not meet.
        nodes=(--standalone --local_addr=127.0.0.1)
    else
        nodes=(
            --nnodes="${NNODES:-1}"
            --node_rank="${NODE_RANK:-0}"
            --master_addr="${MASTER_ADDR:-127.0.0.1}"
            --master_port="${PORT:-29500}"
        )
    fi
    PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}" \
        "${PYTHON:-python}" -m torch.distributed.run \
        "${nodes[@]}" \
        --nproc_per_node="$1" \
        "$TOOLS/$2" "${@:3}"
}
