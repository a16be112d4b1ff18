# What every job does, sourced by the .sbatch files: one task a GPU runs the recipe in "$@"; a run that was stopped in
# time is queued again and resumes.
#
# From the environment, all optional:
#   PYTHON         the interpreter, or what leads to it: PYTHON="apptainer exec --nv lota.sif python"
#   SRUN_OPTIONS   more options of srun: SRUN_OPTIONS="--container-image=lota.sqsh --container-mounts=/data"
#   MAX_REQUEUES   how often the job may queue itself again (100)
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "nothing to run: sbatch recipes/slurm/one_node.sbatch recipes/train_lota.py --config FILE --output_dir DIR" >&2
  exit 2
fi
# On an empty output_dir the option starts a new run, so a job can always have it. A run resumes from a named checkpoint
# once. evaluate.py continues by itself.
case $1 in
  *evaluate.py) ;;
  *)
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || [[ " $*" != *" --resume_from_checkpoint"* ]]; then
      set -- "$@" --resume_from_checkpoint true
    fi
    ;;
esac

# Where the ranks meet: on the first node, at a port that two jobs on it are unlikely to share.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
export MASTER_ADDR MASTER_PORT
# Since 22.05 srun does not take this one over from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# When SLURM ends or requeues a job it signals the ranks and this shell. A shell that died of it would end srun and the
# ranks before they have saved.
ended=
trap 'ended=yes' TERM

echo "[job] $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), $SLURM_JOB_NUM_NODES nodes: $SLURM_JOB_NODELIST"
status=0
# Python is the task itself, so that signals reach the ranks and not a launcher. USR1 is ignored until a recipe listens.
# --kill-on-bad-exit: a rank that dies takes the job with it; the others get SIGTERM, then SIGKILL.
srun --kill-on-bad-exit=1 ${SRUN_OPTIONS:-} bash -c '
  trap "" USR1
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  exec "$@"' rank ${PYTHON:-python} "$@" || status=$?

# 75: stopped by a signal, with a checkpoint. Any other status but 0 is a fault, which another start would meet again.
if [ "$status" -ne 75 ] || [ -n "$ended" ]; then
  exit "$status"
fi
if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_REQUEUES:-100}" ]; then
  echo "[job] not queued again after ${SLURM_RESTART_COUNT:-0} times (MAX_REQUEUES)" >&2
  exit "$status"
fi
echo "[job] queued again, to resume"
scontrol requeue "$SLURM_JOB_ID"
