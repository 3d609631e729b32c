# shellcheck shell=bash
# Sourced by the scripts that start several processes, on one machine or on several.

# launch N PROGRAM FLAGS...: starts N processes on this machine. For several machines, start the same script on each of
# them and set NNODES (number of machines), NODE_RANK (0, 1, ...) and MASTER_ADDR (name or address of machine 0);
# also MASTER_PORT if port 29500 is taken.
launch() {
    local where=(--standalone)
    if [[ ${NNODES:-1} -gt 1 ]]; then
        where=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?the number of this machine, 0 on the first}"
            --master_addr "${MASTER_ADDR:?the address of machine 0}" --master_port "${MASTER_PORT:-29500}")
    fi
    torchrun "${where[@]}" --nproc_per_node "$1" "${@:2}"
}
