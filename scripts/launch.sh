# shellcheck shell=bash
# Sourced by the scripts that start several processes, on this machine or on several.

# launch N PROGRAM FLAGS...: N processes here. On several machines start the same script on each with NNODES (how many
# machines), NODE_RANK (0, 1, ...) and MASTER_ADDR (a name or address of machine 0) set; MASTER_PORT if 29500 is taken.
launch() {
    local where=(--standalone)
    if [[ ${NNODES:-1} -gt 1 ]]; then
        where=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?the number of this machine, 0 on the first}"
            --master_addr "${MASTER_ADDR:?the address of machine 0}" --master_port "${MASTER_PORT:-29500}")
    fi
    torchrun "${where[@]}" --nproc_per_node "$1" "${@:2}"
}
