#!/bin/bash
# One merge on four machines of eight GPUs under Slurm: sbatch examples/slurm.sh merge.yaml /shared/merged
# After a failure, or when its time is up, submit the same again: it goes on where it stopped.
#SBATCH --job-name=mingle-merge
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00

set -euo pipefail

config=$1
out=$2
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One torchrun per machine, which starts a process per GPU.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:29500" \
    -m mingle merge "$config" --out "$out"
