# What is this cluster's own. Sourced by slurm/*.sbatch, from the folder that sbatch was called in.
#
# Options for sbatch stand in its environment variables, as here, or on its command line:
#
#   export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=mine
#
# module load cuda/12.8
# source /shared/venvs/clipscale/bin/activate
# export NCCL_SOCKET_IFNAME=ib0
# export MASTER_ADDR=10.0.0.7                       # where node names do not resolve

MAX_RESTARTS=${MAX_RESTARTS:-10} # a job that fails when it has been put back so often, for any reason, has failed
