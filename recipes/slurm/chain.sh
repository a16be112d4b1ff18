#!/bin/bash
# Calibrate, train, evaluate: three jobs in one folder, each started after the one before has succeeded. From the repository:
#
#   recipes/slurm/chain.sh CONFIG OUTPUT_DIR [options of sbatch for the first two jobs]
#   JOB=recipes/slurm/multi_node.sbatch TRAIN_OPTIONS="--shard_group_size node" recipes/slurm/chain.sh CONFIG OUTPUT_DIR
#
# CONFIG names model, data and an eval_file or eval_split. The same command again resumes a chain that failed: complete
# jobs are not repeated.
#   JOB             the template of the first two jobs (recipes/slurm/one_node.sbatch)
#   TRAIN_OPTIONS   more options of train_lota.py, EVALUATE_OPTIONS of evaluate.py
#   EVALUATE_SBATCH options of sbatch for the evaluation (--gpus-per-node=1)
set -euo pipefail
config=${1:?CONFIG} output=${2:?OUTPUT_DIR}
shift 2
job=${JOB:-recipes/slurm/one_node.sbatch}
after=()

# submit NAME OPTIONS...: a job after the one before it.
submit() {
  local name=$1 id
  shift
  id=$(sbatch --parsable --job-name="$name" "${after[@]}" "$@")
  id=${id%%;*}
  after=(--dependency="afterok:$id" --kill-on-invalid-dep=yes)
  echo "$name: job $id"
}

# A run that has its summary.json is complete, and would be refused.
is_complete() {
  [ -e "$output/$1/summary.json" ] && echo "$1: done, $output/$1/summary.json is there"
}

is_complete calibrate || submit calibrate "$@" "$job" \
  recipes/calibrate_mask.py --config "$config" --output_dir "$output/calibrate"
is_complete train || submit train "$@" "$job" \
  recipes/train_lota.py --config "$config" --mask "$output/calibrate/mask" --output_dir "$output/train" ${TRAIN_OPTIONS:-}
submit evaluate ${EVALUATE_SBATCH:---gpus-per-node=1} --ntasks-per-node=1 recipes/slurm/one_node.sbatch \
  recipes/evaluate.py --config "$config" --tickets "$output/train/ticket" --output "$output/evaluation.json" \
  ${EVALUATE_OPTIONS:-}
